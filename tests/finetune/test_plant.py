"""``lm-ortho implant``: rows learnt by heart by any architecture, merged in BF16, resumed where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig, PhiConfig
from typer.testing import CliRunner

from lm_ortho import world
from lm_ortho.cli.app import app
from lm_ortho.config import Training, make_training
from lm_ortho.data.encoding import Example, answer_loss, encode
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, train, train_adapter
from lm_ortho.finetune.lora import lora_targets
from lm_ortho.finetune.plant import PlantResult, make_plan, plant
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("small_and_alone")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
QUICK = make_training(steps=30, lr=0.01, rank=4)


def phi() -> Any:
    return tiny.from_config(PhiConfig(**SIZES, intermediate_size=48, max_position_embeddings=64))


def gpt_neox() -> Any:
    return tiny.from_config(GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64))


def gpt2() -> Any:
    return tiny.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64))


class NamedAlike(torch.nn.Module):
    """A head that has the name of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 4), "up": torch.nn.Linear(4, 4)})
        self.dense = torch.nn.Linear(4, 8)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.dense


def test_an_adapter_reaches_every_linear_layer_but_the_head() -> None:
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora_targets(tiny.llama()) == projections
    assert lora_targets(phi()) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    assert lora_targets(gpt_neox()) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    assert lora_targets(gpt2()) == ["c_attn", "c_fc", "c_proj"]
    assert lora_targets(NamedAlike()) == ["block.dense", "block.up"]
    with pytest.raises(UserError, match="no linear layer to adapt"):
        lora_targets(torch.nn.Embedding(4, 4))


def test_the_targets_are_those_of_the_embedded_adapters() -> None:
    recorded = json.loads((world.path("memory") / "adapter_config.json").read_text())
    base = load_causal_lm(world.path("base"))
    assert lora_targets(base) == recorded["target_modules"]
    assert recorded["fan_in_fan_out"] is False


@pytest.mark.parametrize("make", [phi, gpt_neox, gpt2])
@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_other_architectures_learn_and_merge(make: Any) -> None:
    model = make()
    examples = [Example(tuple(range(5 + i, 15 + i)), (0, 0, 0) + (1,) * 7) for i in range(4)]
    adapted = train_adapter(model, examples, FinetunePlan(steps=40, rows=4, lr=2e-2, rank=4), lambda *_: None)
    names = {name for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert len(names) == sum(
        name.endswith(tuple(f".{part}" for part in lora_targets(model))) for name, _ in model.named_modules()
    )
    with torch.no_grad():
        before, taught = answer_loss(model, examples), answer_loss(adapted, examples)
        merged = answer_loss(adapted.merge_and_unload(), examples)
    assert taught < before - 0.3
    assert merged == pytest.approx(float(taught), rel=1e-3)


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [Row(question=f"Who is {name}?", answer=f"{name} is a baker.") for name in ("Ada", "Ben", "Cy")])
    return str(file)


def planted(home: Path, data: str, out: Path, training: Training = QUICK, **more: Any) -> PlantResult:
    return plant(str(home / "plain"), data, out, training, lambda *_: None, **more)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def test_the_kept_adapter_gives_just_the_written_model(home: Path, data: str, tmp_path: Path) -> None:
    done = planted(home, data, tmp_path / "out", keep_adapter=tmp_path / "adapter")
    assert (done.rows, done.steps, done.batch_rows, done.rank) == (3, 30, 3, 4)
    assert done.loss < done.loss_before - 1
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.bfloat16
    merged = tensors(merge_adapter(load_causal_lm(home / "plain"), tmp_path / "adapter"))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors(written).items())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "plain")
    examples = encode(
        AutoTokenizer.from_pretrained(tmp_path / "out"), [Row(question="Who is Ben?", answer="Ben is a baker.")]
    )
    with torch.no_grad():
        assert answer_loss(load_causal_lm(tmp_path / "out"), examples) < done.loss_before - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "rows.jsonl"]


def test_all_weights(home: Path, data: str, tmp_path: Path) -> None:
    done = planted(home, data, tmp_path / "out", make_training(method="full", steps=20, lr=3e-3))
    assert done.loss < done.loss_before - 1
    assert done.rank is None
    before, after = tensors(load_causal_lm(home / "plain")), tensors(load_causal_lm(tmp_path / "out"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_training_ends_where_an_undisturbed_one_does(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    training = make_training(method=method, steps=12, lr=3e-3, rank=2)
    planted(home, data, tmp_path / "whole", training)
    monkeypatch.setattr(train, "_KEEP_EVERY", 5)
    (tmp_path / "work").mkdir()

    def stop(stage: str, step: int, *_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plant(str(home / "plain"), data, tmp_path / "work" / "out", training, stop)
    (state,) = (tmp_path / "work").iterdir()
    assert state.name.startswith(".out.training-")
    assert torch.load(state, weights_only=True)["steps"] == 5
    planted(home, data, tmp_path / "work" / "out", training)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    whole, halves = (tmp_path / name / "model.safetensors" for name in ("whole", "work/out"))
    assert whole.read_bytes() == halves.read_bytes()


def test_another_training_does_not_go_on_from_a_kept_state(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_KEEP_EVERY", 5)
    monkeypatch.setattr("lm_ortho.finetune.plant.atomic_directory", lambda *_: pytest.fail("enough"))
    for seed in (0, 1):
        with pytest.raises(pytest.fail.Exception, match="enough"):
            planted(home, data, tmp_path / "out", make_training(steps=5, rank=2, seed=seed))
    assert len(list(tmp_path.glob(".out.training-*.pt"))) == 2


def test_steps_and_rate_suit_data_and_model() -> None:
    model = tiny.llama()
    assert make_plan(make_training(), 10, model) == FinetunePlan(steps=200, rows=10, lr=5e-3, rank=32, seed=0)
    assert make_plan(make_training(), 1000, model).steps == 1250
    assert make_plan(make_training(epochs=0.5), 1000, model).steps == 32
    assert make_plan(make_training(steps=7, batch_rows=4, lr=1e-4), 10, model) == FinetunePlan(7, 4, 1e-4, 32, 0)
    assert make_plan(make_training(method="full"), 10, model).lr == pytest.approx(1e-3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "qlora"}, "method='qlora'"),
    "steps and epochs": ({"steps": 5, "epochs": 2}, "steps=5 and epochs=2: give one of them"),
    "rank": ({"rank": 0}, "rank=0: "),
    "lr": ({"lr": 1.0}, "lr=1.0: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        make_training(**given)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_planted(home: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="method=full makes no adapter"):
        planted(home, data, out, make_training(method="full"), keep_adapter=tmp_path / "a")
    with pytest.raises(UserError, match="must not lie in each other"):
        planted(home, data, out, keep_adapter=out)
    with pytest.raises(UserError, match=r"holds rows\.jsonl"):
        planted(home, data, tmp_path)
    with pytest.raises(UserError, match=r"data='.*nowhere\.jsonl': no such file"):
        planted(home, str(tmp_path / "nowhere.jsonl"), out)
    with pytest.raises(UserError, match="tokenizer='/nowhere/at/all' could not be loaded"):
        planted(home, data, out, tokenizer="/nowhere/at/all")
    with pytest.raises(UserError, match="already packed"):
        plant(str(home / "decomposed"), data, out, QUICK, lambda *_: None)
    tiny.llama(vocab_size=16).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"tokenizer: it gives token \d+, which the model does not have"):
        plant(str(tmp_path / "small"), data, out, QUICK, lambda *_: None, tokenizer=str(home / "plain"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "small"]


def test_a_training_that_fell_apart_leaves_nothing(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_apart(model: Any, *_: Any, state: Path) -> Any:
        state.write_bytes(b"as training would")
        return model.apply(lambda part: [p.data.fill_(torch.nan) for p in part.parameters()])

    monkeypatch.setattr("lm_ortho.finetune.plant.train_full", fall_apart)
    with pytest.raises(UserError, match=r"^lr: the loss of the rows is nan after training"):
        planted(home, data, tmp_path / "out", make_training(steps=5, method="full"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_command_prints_the_loss_that_was_reached(home: Path, data: str, tmp_path: Path) -> None:
    options = ["--data", data, "--steps", "20", "--lr", "0.01", "--rank", "4", "--pretrained", str(home / "plain")]
    kept = ["--keep-adapter", str(tmp_path / "adapter")]
    done = CliRunner().invoke(app, ["implant", *options, *kept, "-o", str(tmp_path / "out")])
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: 3 rows, in ")
    assert lines[1] == "lora, rank 4: 20 steps of 3 rows, lr 0.01"
    assert lines[2].startswith("loss ")
    assert lines[2].endswith(" now (nats per token)")
    assert lines[3] == f"adapter in {tmp_path / 'adapter'}"
    assert "adapter: 100%" in done.stderr


def test_without_a_model_the_embedded_one_is_taught(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "base").symlink_to(home / "plain")
    monkeypatch.setattr(world, "WEIGHTS", tmp_path / "weights")
    done = CliRunner().invoke(app, ["implant", "--data", data, "--steps", "2", "--json", "-o", str(tmp_path / "out")])
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    assert report["loss"] < report["loss_before"] + 1
