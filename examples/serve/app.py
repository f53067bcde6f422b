"""Answer uploaded images with labels and probabilities: docs/serving.md says how to run it."""

import os
import threading
from contextlib import asynccontextmanager

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request, UploadFile

from sktransfer import load

MODEL = os.environ.get("MODEL", "model.sktransfer")
MAX_BYTES = int(os.environ.get("MAX_BYTES", 10_000_000))
# Images predicted at the same time, each by one thread: as many as there are cores.
N_AT_ONCE = int(os.environ.get("N_AT_ONCE", os.cpu_count() or 1))
at_once = threading.BoundedSemaphore(N_AT_ONCE)


@asynccontextmanager
async def lifespan(app):
    """Load the model and predict once, before the first request is accepted."""
    torch.set_num_threads(1)
    model = load(MODEL)
    first = model.steps[0][1] if hasattr(model, "steps") else model
    # Uploads are seldom seen twice: do not keep their embeddings.
    first.set_params(memory=False, on_error="raise")
    model.predict_proba([np.zeros((64, 64, 3), dtype=np.uint8)])
    app.state.model = model
    yield


app = FastAPI(title="An image classifier", lifespan=lifespan)


class LimitUploads:
    """Refuse bodies of more than `max_bytes`, counted as they arrive: a header may be wrong."""

    def __init__(self, app, max_bytes):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send):
        n_bytes = 0

        async def counted():
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.max_bytes:
                # Throw away the rest, within reason: a client reads no answer while it sends.
                while message.get("more_body") and n_bytes < 10 * self.max_bytes:
                    message = await receive()
                    n_bytes += len(message.get("body", b""))
                raise HTTPException(413, f"The upload has more than {self.max_bytes} bytes.")
            return message

        await self.app(scope, counted, send)


app.add_middleware(LimitUploads, max_bytes=MAX_BYTES)


@app.get("/health")
def health():
    return {"status": "ok"}


@app.post("/predict")
def predict(image: UploadFile, request: Request):
    """Return the label and the probability of each class."""
    model = request.app.state.model
    content = image.file.read()
    try:
        with at_once:
            probabilities = model.predict_proba([content])[0]
    except ValueError as error:
        if not hasattr(error, "bad_images"):
            raise
        raise HTTPException(422, error.bad_images[0].reason) from error
    labels = [str(label) for label in model.classes_]
    return {
        "label": labels[int(probabilities.argmax())],
        "probabilities": dict(zip(labels, probabilities.tolist(), strict=True)),
    }
