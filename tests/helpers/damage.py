"""Damaged models: functions that put one into a folder, called with the folder and with the places (stages.py)."""

import shutil

import torch
from safetensors.torch import save_file


def model(change):
    """A `prepare` that copies the policy to {tmp}/model and calls `change` with the copy."""

    def prepare(folder, places):
        shutil.copytree(places["policy"], folder / "model")
        change(folder / "model")

    return prepare


def replace(name, text):
    return model(lambda directory: (directory / name).write_bytes(text))


def remove(name):
    return model(lambda directory: (directory / name).unlink())


@model
def half_the_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@model
def one_tensor(directory):
    save_file({"weight": torch.zeros(3)}, directory / "model.safetensors")


@model
def narrower(directory):
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 256', '"intermediate_size": 200'))


@model
def only_bin(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"junk")
