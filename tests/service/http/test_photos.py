"""A photo is served the pixels that it was trained with, whatever scale it is decoded at."""

from dataclasses import replace

import httpx
import numpy as np
import torch
from PIL import Image

from dropserve.models import checkpoint
from dropserve.models.data import load_dataset
from dropserve.models.networks import NetworkConfig


def test_photos_are_decoded_alike_to_train_and_to_serve(tmp_path, make_server):
    noise = np.random.default_rng(0).integers(0, 256, (8, 300, 400, 3), np.uint8)
    photos = [tmp_path / "photos" / name / f"{i}.jpg" for name in "ab" for i in range(4)]
    for turned, (photo, pixels) in enumerate(zip(photos, noise, strict=True), 1):
        photo.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = turned
        Image.fromarray(pixels).save(photo, exif=exif)
    folder = str(tmp_path / "photos")
    trained = load_dataset(folder, tmp_path, size=(24, 30), fit="crop").preprocessing
    network = NetworkConfig("mlp", trained.shape, 2, (16,), (0.5,))
    expected = {}
    for name, how in (("new", trained), ("old", replace(trained, draft=False))):
        module, about = network.build().eval(), checkpoint.Metadata(name, network, how, ("a", "b"))
        checkpoint.save(tmp_path, module, about)
        images = load_dataset(folder, tmp_path, preprocessing=how, whole=True).test.images
        expected[name] = torch.softmax(module(how.normalize(images)), 1).detach().tolist()
    server = make_server(tmp_path, default_model="new").start()
    for name, probabilities in expected.items():
        files = [("file", (photo.name, photo.read_bytes(), "image/jpeg")) for photo in photos]
        answer = httpx.post(f"{server.url}/v1/models/{name}/predict", files=files).json()
        found = [prediction["probabilities"] for prediction in answer["predictions"]]
        np.testing.assert_allclose(found, probabilities, atol=1e-5)
