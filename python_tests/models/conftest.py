import pytest
import torch


@pytest.fixture
def save(tmp_path):
    def save(content):
        path = tmp_path / "model.ckpt"
        torch.save(content, path)
        return path

    return save
