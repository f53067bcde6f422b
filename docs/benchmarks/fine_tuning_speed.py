"""What is frozen is computed once: fine-tuning's time against what it is made of.

    python docs/benchmarks/fine_tuning_speed.py [--backbone mobilenet_v2] [--images 500]

On photographs of `flowers5`, no store shared between the runs:

1. head only, 20 epochs, against one extraction pass over the same files;
2. the last stage, 10 epochs without augmentation, against skorch with the same parameters frozen
   (its data set decodes in each epoch, as tutorials write it, or holds ready tensors), for
   several draws of the photographs; skorch decodes in the first draw only, as the network is
   the same;
3. everything trained: images per second in an epoch, against forward, backward and optimizer
   step alone on ready tensors: of the module that is trained, and of the network as its authors
   wrote it.
"""

import argparse
import time

import numpy as np
from _fine_tuning_peers import WEIGHTS, head_of, module_of, pictures, read_set, skorch_net
from _report import save

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def estimator(backbone, **settings):
    settings = {"memory": False, "early_stopping": False, "random_state": 0, **settings}
    return FineTuningClassifier(backbone, weights=WEIGHTS[backbone], **settings)


def head_only(backbone, X, y, n_rounds):
    """Medians of seconds: one extraction; a fit of the head for 20 epochs."""
    extraction, fit = [], []
    for _ in range(n_rounds):
        extractor = PretrainedFeatureExtractor(backbone, weights=WEIGHTS[backbone], memory=False)
        extraction.append(timed(lambda extractor=extractor: extractor.fit_transform(X))[0])
        model = estimator(backbone, unfreeze=0, max_epochs=20)
        fit.append(timed(lambda model=model: model.fit(X, y))[0])
    return float(np.median(extraction)), float(np.median(fit))


def last_stage(backbone, X, y, X_test, y_test, seed):
    """Seconds and accuracy of ours and of skorch's, the last stage trained for 10 epochs."""
    import torch

    model = estimator(backbone, unfreeze=1, max_epochs=10, augment=None, random_state=seed)
    rows = {"sktransfer": (timed(lambda: model.fit(X, y))[0], model.score(X_test, y_test))}
    net = model.net_
    trained = sum(p.numel() for p in net.module_.parameters() if p.requires_grad)
    classes, codes = np.unique(y, return_inverse=True)
    origin = model.backbone_
    # The same parameters by name: the network's last stage, and the new last layer.
    stage = [stage for stage in origin.stages if stage.name not in ("pool", "head")][-1]
    own = {id(p) for p in stage.module.parameters()}
    names = {n for n, p in origin.network.module.named_parameters() if id(p) in own}
    head = head_of(backbone)

    def is_frozen(name):
        return name not in names and not name.startswith(head)

    test = pictures(backbone, X_test, np.zeros(len(X_test)))
    for label, is_ready in (("skorch, decoding", False), ("skorch, ready tensors", True)):
        if seed and not is_ready:
            continue
        torch.manual_seed(seed)
        rows_of = pictures(backbone, X, codes)

        def fit(rows_of=rows_of, is_ready=is_ready):
            if is_ready:
                pairs = [rows_of[i] for i in range(len(rows_of))]
                rows_of = torch.utils.data.TensorDataset(
                    torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
                )
            net = skorch_net(module_of(backbone, len(classes)), is_frozen, 10)
            return net.fit(rows_of, None)

        seconds, net = timed(fit)
        rows[label] = (seconds, float((classes[net.predict(test)] == y_test).mean()))
    return trained, rows


def busy(backbone, X, y, batch_size=32):
    """Images per second: an epoch of ours, and bare training steps on ready tensors."""
    import torch

    model = estimator(backbone, max_epochs=4, batch_size=batch_size).fit(X, y)
    seconds = [row["seconds"] for row in model.history_ if row["epoch"] > 1]
    ours = len(X) / float(np.median(seconds))
    module = model.net_.module_
    n_classes, size = len(model.classes_), model.backbone_.input_size
    device = next(module.parameters()).device
    pixels = torch.randint(0, 255, (batch_size, 1, *size), dtype=torch.uint8, device=device)
    target = torch.randint(0, n_classes, (batch_size,), device=device)
    plain = module_of(backbone, n_classes).to(device).train()

    def steps(module, x):
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)

        def step():
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(module(x), target).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        step()
        step()
        return batch_size / float(np.median([timed(step)[0] for _ in range(12)]))

    return ours, steps(module.train(), pixels), steps(plain, pixels[:, 0] / 255)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="mobilenet_v2", choices=list(WEIGHTS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the last stage's part")
    parser.add_argument("--parts", nargs="+", type=int, default=[1, 2, 3], choices=[1, 2, 3])
    options = parser.parse_args()
    X, y, *_ = read_set("flowers5", options.images // 5, 0, 40)
    PretrainedFeatureExtractor(
        options.backbone, weights=WEIGHTS[options.backbone], memory=False
    ).fit_transform(X[:32])  # what is loaded once is not measured

    def keep(part, figures):
        # A file for each part, so that each can be run again alone.
        content = {"options": vars(options), part: figures}
        save(f"fine_tuning_speed_{part}_{options.backbone}", content)

    if 1 in options.parts:
        extraction, fit = head_only(options.backbone, X, y, options.rounds)
        print(
            f"head only, 20 epochs: {fit:.2f} s, one extraction {extraction:.2f} s, "
            f"ratio {fit / extraction:.2f} (aim: at most 1.3)"
        )
        keep("head_only", {"fit": fit, "extraction": extraction, "ratio": fit / extraction})
    if 2 in options.parts:
        draws = []
        for seed in range(options.seeds):
            drawn = read_set("flowers5", options.images // 5, seed, 40)
            n_trained, rows = last_stage(options.backbone, *drawn, seed)
            print(f"last stage, 10 epochs, {n_trained} parameters, draw {seed}:")
            for label, (seconds, accuracy) in rows.items():
                print(
                    f"  {label:24} {seconds:7.1f} s {seconds / rows['sktransfer'][0]:5.1f}x "
                    f"accuracy {accuracy:.3f}",
                    flush=True,
                )
            draws.append({"n_trained": n_trained, "rows": rows})
        keep("last_stage", draws)
    if 3 in options.parts:
        ours, alone, plain = busy(options.backbone, X, y)
        print(
            f"everything trained: {ours:.1f} images/s, forward and backward alone {alone:.1f}, "
            f"ratio {ours / alone:.2f} (aim: at least 0.9); of the plain network {plain:.1f}, "
            f"ratio {ours / plain:.2f}"
        )
        keep("busy", {"ours": ours, "alone": alone, "plain": plain, "ratio": ours / alone})


if __name__ == "__main__":
    main()
