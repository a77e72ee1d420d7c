"""Texts of tako.toml, read or refused."""

from pathlib import Path

import pytest

from tako_runtime import config
from tako_runtime.errors import ConfigError


def parse(text: str) -> config.Config:
    return config.parse(text.encode(), Path("tako.toml"))


def shop(text: str) -> config.Config:
    """A file with a name on line 1 and this text from line 2."""
    return parse('name = "shop"\n' + text)


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        shop(text)
    return caught.value
