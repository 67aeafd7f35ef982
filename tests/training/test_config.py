"""Settings: defaults, TOML over them, flags over both, and what is refused."""

import tomllib
from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_fast import config
from genai_fast.config import Config
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.training import ConfigError


def test_later_sources_win(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('epochs = 7\nlr = 1\nlikelihood = "gaussian"\n')
    settings = config.build(VAEConfig, {**config.read(path, "vae"), "epochs": 9}, "settings")
    assert (settings.epochs, settings.lr, settings.likelihood, settings.latent) == (9, 1.0, "gaussian", 20)
    assert type(settings.lr) is float


def test_every_setting_is_explained():
    for f in fields(VAEConfig):
        assert f.metadata["help"] and not f.metadata["help"].endswith(".")


@settings(deadline=None)
@given(
    data=st.text(st.characters(exclude_categories=["Cs"])),
    lr=st.floats(1e-300, 1e300),
    beta=st.floats(0, 1e300),
    seed=st.integers(0, 2**32 - 1),
)
def test_saved_settings_read_back_the_same(tmp_path_factory, data, lr, beta, seed):
    settings = VAEConfig(data=data, lr=lr, beta=beta, seed=seed)
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    path.write_bytes(config.to_toml(settings, "vae").encode())
    assert tomllib.loads(path.read_text(encoding="utf-8"))["recipe"] == "vae"
    assert config.build(VAEConfig, config.read(path, "vae"), "settings") == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("laten = 3", "unknown key 'laten'; did you mean latent?"),
        ("batch-size = 3", "unknown key 'batch-size'; did you mean batch_size?"),
        ("qqqq = 3", "unknown key 'qqqq'; expected one of data, strict"),
        ('epochs = "3"', r"epochs: expected int, got '3' \(str\)"),
        ("epochs = 3.0", r"epochs: expected int, got 3\.0 \(float\)"),
        ("epochs = true", r"epochs: expected int, got True \(bool\)"),
        ("lr = true", r"lr: expected float, got True \(bool\)"),
        ("lr = 0", r"lr: expected a number > 0, got 0\.0"),
        ("lr = nan", "lr: expected a number > 0, got nan"),
        ("lr = inf", "lr: expected a number > 0, got inf"),
        ("epochs = 0", "epochs: expected a number >= 1, got 0"),
        ("validation = 0.95", r"validation: expected a number > 0 and <= 0\.9, got 0\.95"),
        ("seed = 4294967296", "seed: expected a number >= 0 and <= "),
        ('likelihood = "bernouli"', "likelihood: expected bernoulli or gaussian, got 'bernouli'"),
        ("[epochs]\nvalue = 3", r"epochs: expected epochs = value, got a table \[epochs\]"),
        ("epochs = ", "expected TOML, got Invalid value"),
        ('recipe = "gan"', "expected settings of recipe 'vae', got 'gan'"),
    ],
)
def test_mistakes_are_named_with_their_file(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        config.build(VAEConfig, config.read(path, "vae"), str(path))
    assert str(path) in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: expected a TOML file, got No such file"):
        config.read(tmp_path / "nowhere.toml", "vae")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.toml: expected TOML"):
        config.read(tmp_path / "a.toml", "vae")


def test_a_config_made_in_code_is_checked_too():
    assert asdict(Config())["epochs"] == Config().epochs
    with pytest.raises(ConfigError, match="latent: expected a number >= 1, got 0"):
        VAEConfig(latent=0)
