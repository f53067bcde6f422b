"""Train the built-in backbone: ``python docs/builtin/train.py --work FOLDER``.

Runs on a CPU or a GPU, resumes where it was stopped (``--work`` keeps everything), and logs one
line an epoch to ``FOLDER/train_log.csv``. It needs the packed Tiny ImageNet of
``$SKTRANSFER_DATA/data/tiny_imagenet_64`` and the MobileNetV2 of ``$SKTRANSFER_DATA/weights``.

1. *decode*: the images, once, into an array of uint8.
2. *teach*: what the ImageNet MobileNetV2 sees in ``--views`` fixed random crops of each image,
   enlarged to 128 pixels: the pooled embedding, and mean and standard deviation over the
   positions of two earlier layers (texture and edges rather than objects).
3. *train*: the student sees the same crops, slightly shifted, at 48 and later 64 pixels, in other
   colours, sharper or softer, and learns (a) the 200 classes, (b) the teacher's 1000 ImageNet
   probabilities, (c) the teacher's standardised features, through linear heads that are
   thrown away, so what they read must lie linearly in the embedding.
4. *export*: the moving average of the weights, 16-bit, as one safetensors file.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sktransfer.networks.builtin._network import BuiltinNet

SHARED = Path(os.environ.get("SKTRANSFER_DATA", Path(__file__).resolve().parents[3] / "shared"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEACHER_SIZE = 128
N_EMBEDDING, N_TEXTURE = 1280, 256  # columns of a teacher row: pooled output, earlier layers
BATCH = 256
LR, WEIGHT_DECAY = 2e-3, 0.05


# --- 1. images -------------------------------------------------------------------------------


def decode(name: str) -> tuple[np.ndarray, np.ndarray]:
    packed = np.load(SHARED / "data" / "tiny_imagenet_64" / f"{name}.npz")
    headers = [packed[f"jpeg_header_{k}"].tobytes() for k in (0, 1)]
    blob, offset, which, y = (packed[k] for k in ("blob", "offset", "header", "label"))
    X = np.empty((len(y), 64, 64, 3), np.uint8)
    for i in range(len(y)):
        stream = headers[which[i]] + blob[offset[i] : offset[i + 1]].tobytes()
        X[i] = np.asarray(Image.open(io.BytesIO(stream)).convert("RGB"))
    return X, y.astype(np.int64)


def load_images(work: Path) -> dict[str, np.ndarray]:
    path = work / "tiny.npz"
    if not path.exists():
        parts = [decode(f"train_{k}") for k in range(4)]
        X, y = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        X_val, y_val = decode("val")
        np.savez(path, X=X, y=y, Xv=X_val, yv=y_val)
    with np.load(path) as z:
        return {k: z[k] for k in z.files}


# --- 2. teacher ------------------------------------------------------------------------------


def view_boxes(n: int, view: int) -> torch.Tensor:
    """Fixed crops: 30 to 100 % of the area. Rows are (half width, half height, x, y) in -1..1."""
    g = torch.Generator().manual_seed(1000 + view)
    area = 0.3 + 0.7 * torch.rand(n, generator=g)
    ratio = ((torch.rand(n, generator=g) * 2 - 1) * math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x = (torch.rand(n, generator=g) * 2 - 1) * (1 - w)
    y = (torch.rand(n, generator=g) * 2 - 1) * (1 - h)
    return torch.stack([w, h, x, y], 1)


def cut(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = boxes.unbind(1)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def to_float(batch: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float().div_(255)


def normalise(x: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([MEAN, STD], device=x.device).view(2, 1, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def load_teacher() -> nn.Module:
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2()
    net.load_state_dict(load_file(SHARED / "weights" / "mobilenet_v2_imagenet.safetensors"))
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                if isinstance(module[i + 1], nn.BatchNorm2d):
                    module[i] = fuse_conv_bn_eval(module[i], module[i + 1])
                    module[i + 1] = nn.Identity()
    return net


def teach(work: Path, X: np.ndarray, view: int, device: str) -> np.ndarray:
    path = work / f"teach{view}.npy"
    if path.exists():
        return np.load(path)
    layers = load_teacher().features.to(device, torch.bfloat16, memory_format=torch.channels_last)
    boxes = view_boxes(len(X), view)
    rows = np.empty((len(X), N_EMBEDDING + N_TEXTURE), np.float16)
    for i in range(0, len(X), 200):
        x = cut(to_float(X[i : i + 200], device), boxes[i : i + 200].to(device), TEACHER_SIZE)
        x, texture = normalise(x).bfloat16(), []
        with torch.inference_mode():
            for k, layer in enumerate(layers):
                x = layer(x)
                if k in (6, 13):
                    texture += [x.float().mean((2, 3)), x.float().std((2, 3))]
            rows[i : i + 200] = torch.cat([x.float().mean((2, 3)), *texture], 1).half().cpu()
    np.save(work / "unfinished.npy", rows)
    (work / "unfinished.npy").rename(path)
    return rows


# --- 3. student ------------------------------------------------------------------------------


class Student(nn.Module):
    """The network and two linear heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = BuiltinNet()
        self.to_features = nn.Linear(self.net.n_features, N_EMBEDDING + N_TEXTURE)
        self.to_imagenet = nn.Linear(self.net.n_features, 1000)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for name, module in self.net.named_children():
            if name != "head":
                x = module(x)
        return self.net.head(x), self.to_features(x), self.to_imagenet(x)


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Colours, greyness, sharpness and noise, drawn for each image; x in 0..1."""

    def uniform(low: float, high: float, share: float = 1.0) -> torch.Tensor:
        draw = torch.rand(2, len(x), 1, 1, 1, generator=rng)
        value = (low + (high - low) * draw[0]) * (draw[1] < share)
        return value.to(x.device)

    # Sharper (larger photographs scaled down are sharper than these) or softer.
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = x + uniform(-0.8, 1.0, 0.5) * (x - soft)
    grey = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).unsqueeze(1)
    x = torch.lerp(x, grey, uniform(-0.4, 0.4, 0.7))
    x = torch.lerp(x, grey, uniform(1.0, 1.0, 0.1))
    x = torch.lerp(x, grey.mean((2, 3), keepdim=True), uniform(-0.4, 0.4, 0.7))
    x = x * (1 + uniform(-0.3, 0.3, 0.7))
    noisy = torch.rand(len(x), generator=rng) < 0.1
    x[noisy] += 0.04 * torch.randn(x[noisy].shape, generator=rng).to(x.device)
    return x.clamp_(0, 1)


def student_batch(
    X: np.ndarray, boxes: torch.Tensor, size: int, rng: torch.Generator, device: str
) -> torch.Tensor:
    n = len(X)
    jitter = (torch.rand(n, 4, generator=rng) * 2 - 1) * 0.08
    boxes = torch.cat([boxes[:, :2] * (1 + jitter[:, :2]), boxes[:, 2:] + jitter[:, 2:]], 1)
    boxes[:, 0] *= (torch.rand(n, generator=rng) < 0.5).float() * 2 - 1  # mirrored half the time
    x = cut(to_float(X, device), boxes.to(device), size)
    return normalise(augment(x, rng))


def rate(progress: float, cooldown: float) -> float:
    """Warm up, stay, then fall as 1 - sqrt: how long to stay may be decided on the way.

    ``progress`` is the part of a cycle that is done.
    """
    warm = min(1.0, progress / 0.02)
    fall = max(0.0, (progress - 1 + cooldown) / cooldown)
    return warm * (1 - math.sqrt(fall) if fall else 1.0)


@torch.inference_mode()
def accuracy(net: nn.Module, X: np.ndarray, y: np.ndarray, device: str) -> float:
    net.eval()
    hits = 0
    for i in range(0, len(X), 500):
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            out = net(normalise(to_float(X[i : i + 500], device)))
        hits += int((out.argmax(1).cpu().numpy() == y[i : i + 500]).sum())
    return hits / len(X)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device, work = args.device, args.work
    data = load_images(work)
    X, y = data["X"], torch.from_numpy(data["y"])
    taught = [teach(work, X, view, device) for view in range(args.views)]
    boxes = [view_boxes(len(X), view) for view in range(args.views)]
    sample = torch.from_numpy(taught[0][::5].astype(np.float32))
    centre, scale = sample.mean(0).to(device), sample.std(0).clamp(min=1e-3).to(device)
    # The teacher's 1000 logits are a linear function of its embedding.
    classify = load_teacher().classifier[1].to(device, torch.bfloat16)

    student = Student().to(device, memory_format=torch.channels_last)
    decay = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.99), fused=True
    )
    average = {k: v.clone() for k, v in student.state_dict().items()}
    first, seconds = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, seconds = state["average"], state["epoch"], state["seconds"]

    # Replicas: the same parameters, their own batch norm statistics. They work side by side on one
    # core each, which waits less than all cores on each operation.
    replicas = [student] + [copy.deepcopy(student) for _ in range(args.replicas - 1)]
    for replica in replicas[1:]:
        for module, original in zip(replica.modules(), student.modules(), strict=True):
            module._parameters.update(original._parameters)
    parameters = list(student.parameters())

    def learn(
        replica: int, view: int, rows: torch.Tensor, size: int, seed: int
    ) -> tuple[torch.Tensor, tuple]:
        torch.set_num_threads(1)
        rng = torch.Generator().manual_seed(seed)
        x = student_batch(X[rows], boxes[view][rows], size, rng, device)
        target = torch.from_numpy(taught[view][rows]).to(device, torch.float32)
        with torch.no_grad():
            wanted = classify(target[:, :N_EMBEDDING].bfloat16()).float()
            features = ((target - centre) / scale).clamp(-6, 6)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            classes, regressed, imagenet = replicas[replica](x)
        losses = torch.stack(
            [
                F.cross_entropy(classes.float(), y[rows].to(device), label_smoothing=0.1),
                # Temperature 2; its gradient is brought back by the factor (half of T squared).
                2
                * F.kl_div(
                    (imagenet.float() / 2).log_softmax(1),
                    (wanted / 2).log_softmax(1),
                    log_target=True,
                    reduction="batchmean",
                ),
                4 * F.mse_loss(regressed.float(), features),
            ]
        )
        return losses.detach(), torch.autograd.grad(losses.sum(), parameters)

    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(args.replicas if device == "cpu" else 1)
    n_steps = len(X) // BATCH
    ends = list(itertools.accumulate(args.cycles))
    for epoch in range(first, ends[-1]):
        start = time.perf_counter()
        end = next(e for e in ends if epoch < e)
        begin = max((e for e in ends if e <= epoch), default=0)
        size = 48 if epoch < args.epochs_at_48 else 64
        rng = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        order = torch.randperm(len(X), generator=rng)
        for replica in replicas:
            replica.train()
        totals = torch.zeros(3)
        for step in range(n_steps):
            lr = LR * rate((epoch - begin + step / n_steps) / (end - begin), args.cooldown)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = order[step * BATCH : (step + 1) * BATCH].sort().values
            # Each part of a batch in another view; over the epochs every image is seen in all.
            seeds = torch.randint(2**31, (args.replicas,), generator=rng).tolist()
            jobs = [
                pool.submit(
                    learn, k, (k + epoch * args.replicas) % args.views,
                    rows[k :: args.replicas], size, seeds[k],
                )
                for k in range(args.replicas)
            ]  # fmt: skip
            done = [job.result() for job in jobs]
            losses = sum(job[0] for job in done) / args.replicas
            for p, *parts in zip(parameters, *(job[1] for job in done), strict=True):
                p.grad = sum(parts) / args.replicas
            nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            keep = min(0.9985, 1 - 1 / (epoch * n_steps + step + 2))
            with torch.no_grad():
                for k, v in student.state_dict().items():
                    if v.is_floating_point():
                        average[k].lerp_(v, 1 - keep)
                    else:
                        average[k].copy_(v)
            totals += losses.cpu()
            if step % 50 == 0:
                taken = time.perf_counter() - start
                print(epoch, step, [round(float(v), 3) for v in losses],
                      f"{(step + 1) * BATCH / taken:.0f}/s", flush=True)  # fmt: skip
        seconds += time.perf_counter() - start
        net = BuiltinNet().to(device, memory_format=torch.channels_last)
        net.load_state_dict({k[4:]: v for k, v in average.items() if k.startswith("net.")})
        row = {
            "epoch": epoch + 1,
            "size": size,
            "lr": f"{lr:.2e}",
            "classes": f"{totals[0] / n_steps:.4f}",
            "imagenet": f"{totals[1] / n_steps:.4f}",
            "features": f"{totals[2] / n_steps:.4f}",
            "val_accuracy": f"{accuracy(net, data['Xv'], data['yv'], device):.4f}",
            "seconds": f"{seconds:.0f}",
        }
        log = work / "train_log.csv"
        is_new = not log.exists()
        with log.open("a", newline="") as f:
            writer = csv.DictWriter(f, row, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                 "average": average, "epoch": epoch + 1, "seconds": seconds}  # fmt: skip
        torch.save(state, work / "unfinished.pt")
        (work / "unfinished.pt").rename(checkpoint)
        export(net, work / "v1.safetensors")


# --- 4. file ---------------------------------------------------------------------------------


def export(net: nn.Module, path: Path) -> None:
    """Half-precision matrices, float32 vectors (batch norm's statistics span many magnitudes)."""
    tensors = {
        k: (v.half() if v.ndim > 1 else v).contiguous().cpu() for k, v in net.state_dict().items()
    }
    save_file(tensors, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("builtin_work"))
    parser.add_argument("--cycles", type=int, nargs="+", default=[28, 20], help="epochs of each")
    parser.add_argument("--epochs-at-48", type=int, default=18)
    parser.add_argument("--cooldown", type=float, default=0.464, help="last part of a cycle")
    parser.add_argument("--views", type=int, default=4, help="crops that the teacher saw")
    parser.add_argument("--replicas", type=int, default=2, help="parts of a batch, one core each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
