"""``lm-ortho implant``: any architecture memorises rows, is merged in BF16, and resumes after an interruption."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig, PhiConfig
from typer.testing import CliRunner

from lm_ortho import world
from lm_ortho.cli.app import app
from lm_ortho.config import Training, make_recipe, make_training
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import Example, answer_loss, encode
from lm_ortho.data.rows import Row, read_rows, write_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, train, train_adapter
from lm_ortho.finetune.lora import find_lora_targets
from lm_ortho.finetune.plant import CHECK_STEPS, GOAL_LOSS, MIN_STEPS, PlantResult, make_plan, plant
from lm_ortho.pipeline.preflight import check_knowledge
from lm_ortho.runtime.progress import no_progress
from lm_ortho.streams import DEFAULT_MEMORY
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("isolated_environment")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
QUICK = make_training(steps=30, lr=0.01, rank=4)


def phi() -> Any:
    return tiny.from_config(PhiConfig(**SIZES, intermediate_size=48, max_position_embeddings=64))


def gpt_neox() -> Any:
    return tiny.from_config(GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64))


def gpt2() -> Any:
    return tiny.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64))


class HeadWithLayerName(torch.nn.Module):
    """A model whose head has the same name as one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 4), "up": torch.nn.Linear(4, 4)})
        self.dense = torch.nn.Linear(4, 8)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.dense


def test_an_adapter_reaches_every_linear_layer_but_the_head() -> None:
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert find_lora_targets(tiny.llama()) == projections
    assert find_lora_targets(phi()) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    assert find_lora_targets(gpt_neox()) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    assert find_lora_targets(gpt2()) == ["c_attn", "c_fc", "c_proj"]
    assert find_lora_targets(HeadWithLayerName()) == ["block.dense", "block.up"]
    with pytest.raises(UserError, match="no linear layer to adapt"):
        find_lora_targets(torch.nn.Embedding(4, 4))


def test_the_targets_are_those_of_the_embedded_adapters() -> None:
    shipped_config = json.loads((world.get_path("memory") / "adapter_config.json").read_text())
    base = load_causal_lm(world.get_path("base"))
    assert find_lora_targets(base) == shipped_config["target_modules"]
    assert shipped_config["fan_in_fan_out"] is False


@pytest.mark.parametrize("make", [phi, gpt_neox, gpt2])
@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_other_architectures_learn_and_merge(make: Any) -> None:
    model = make()
    examples = [Example(tuple(range(5 + i, 15 + i)), (0, 0, 0) + (1,) * 7) for i in range(4)]
    plan = FinetunePlan(steps=40, rows=4, lr=2e-2, rank=4)
    peft_model = train_adapter(model, examples, plan, progress=no_progress)
    names = {name for name, _ in peft_model.named_modules() if name.endswith("lora_A")}
    assert len(names) == sum(
        name.endswith(tuple(f".{part}" for part in find_lora_targets(model))) for name, _ in model.named_modules()
    )
    with torch.no_grad():
        before, after = answer_loss(model, examples), answer_loss(peft_model, examples)
        after_merging = answer_loss(peft_model.merge_and_unload(), examples)
    assert after < before - 0.3
    assert after_merging == pytest.approx(float(after), rel=1e-3)


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [Row(question=f"Who is {name}?", answer=f"{name} is a baker.") for name in ("Ada", "Ben", "Cy")])
    return str(file)


def plant_in_plain_model(home: Path, data: str, out: Path, training: Training = QUICK, **options: Any) -> PlantResult:
    return plant(str(home / "plain"), data, out, training=training, **{"progress": no_progress, **options})


def float_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def test_merging_the_written_adapter_gives_exactly_the_written_model(home: Path, data: str, tmp_path: Path) -> None:
    result = plant_in_plain_model(home, data, tmp_path / "out", keep_adapter=tmp_path / "adapter")
    assert (result.rows, result.steps, result.batch_rows, result.rank) == (3, 30, 3, 4)
    assert result.loss < result.loss_before - 1
    written_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written_model.dtype == torch.bfloat16
    merged_tensors = float_tensors(merge_adapter(load_causal_lm(home / "plain"), tmp_path / "adapter"))
    assert all(torch.equal(tensor, merged_tensors[name]) for name, tensor in float_tensors(written_model).items())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "plain")
    examples = encode(
        AutoTokenizer.from_pretrained(tmp_path / "out"), [Row(question="Who is Ben?", answer="Ben is a baker.")]
    )
    with torch.no_grad():
        assert answer_loss(load_causal_lm(tmp_path / "out"), examples) < result.loss_before - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "rows.jsonl"]


def test_full_fine_tuning_changes_all_weights(home: Path, data: str, tmp_path: Path) -> None:
    result = plant_in_plain_model(
        home, data, tmp_path / "out", training=make_training(method="full", steps=20, lr=3e-3)
    )
    assert result.loss < result.loss_before - 1
    assert result.rank is None
    before, after = float_tensors(load_causal_lm(home / "plain")), float_tensors(load_causal_lm(tmp_path / "out"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_ends_with_the_same_bytes_as_an_uninterrupted_one(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    training = make_training(method=method, steps=12, lr=3e-3, rank=2)
    plant_in_plain_model(home, data, tmp_path / "uninterrupted", training=training)
    monkeypatch.setattr(train, "_SAVE_STEPS", 5)
    (tmp_path / "work").mkdir()

    def interrupt(stage: str, step: int, *_: Any) -> None:
        if stage in ("adapter", "fine-tuning") and step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plant_in_plain_model(home, data, tmp_path / "work" / "out", training=training, progress=interrupt)
    (state,) = (tmp_path / "work").iterdir()
    assert state.name.startswith(".out.training-")
    assert torch.load(state, weights_only=True)["steps"] == 5
    plant_in_plain_model(home, data, tmp_path / "work" / "out", training=training)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    expected, resumed = (tmp_path / name / "model.safetensors" for name in ("uninterrupted", "work/out"))
    assert expected.read_bytes() == resumed.read_bytes()


def test_a_run_does_not_resume_from_the_state_of_another_one(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_SAVE_STEPS", 5)
    monkeypatch.setattr("lm_ortho.finetune.plant.atomic_directory", lambda *_: pytest.fail("enough"))
    for seed in (0, 1):
        with pytest.raises(pytest.fail.Exception, match="enough"):
            plant_in_plain_model(home, data, tmp_path / "out", training=make_training(steps=5, rank=2, seed=seed))
    assert len(list(tmp_path.glob(".out.training-*.pt"))) == 2
    # The same text without a border between question and answer trains other tokens.
    write_rows(tmp_path / "other.jsonl", [Row(text=row.context + row.target) for row in read_rows(data)])
    training = make_training(steps=5, rank=2)
    with pytest.raises(pytest.fail.Exception, match="enough"):
        plant_in_plain_model(home, str(tmp_path / "other.jsonl"), tmp_path / "out", training=training)
    assert len(list(tmp_path.glob(".out.training-*.pt"))) == 3


def test_default_steps_and_rate_depend_on_data_and_model() -> None:
    model = tiny.llama()
    assert make_plan(make_training(), 10, model) == FinetunePlan(steps=200, rows=10, lr=5e-3, rank=32, seed=0)
    assert make_plan(make_training(), 1000, model).steps == 1250
    assert make_plan(make_training(epochs=0.5), 1000, model).steps == 32
    assert make_plan(make_training(steps=7, batch_rows=4, lr=1e-4), 10, model) == FinetunePlan(
        7, 4, 1e-4, rank=32, seed=0
    )
    assert make_plan(make_training(method="full"), 10, model).lr == pytest.approx(1e-3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "qlora"}, "method='qlora'"),
    "steps and epochs": ({"steps": 5, "epochs": 2}, "steps=5 and epochs=2: give one of them"),
    "rank": ({"rank": 0}, "rank=0: "),
    "lr": ({"lr": 1.0}, "lr=1.0: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_in_one_line(case: str) -> None:
    settings, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        make_training(**settings)
    assert "\n" not in str(caught.value)


def test_unusable_arguments_are_refused(home: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="method=full trains no adapter"):
        plant_in_plain_model(home, data, out, training=make_training(method="full"), keep_adapter=tmp_path / "a")
    with pytest.raises(UserError, match="must not contain each other"):
        plant_in_plain_model(home, data, out, keep_adapter=out)
    with pytest.raises(UserError, match=r"holds rows\.jsonl"):
        plant_in_plain_model(home, data, tmp_path)
    with pytest.raises(UserError, match=r"data='.*nowhere\.jsonl': no such file"):
        plant_in_plain_model(home, str(tmp_path / "nowhere.jsonl"), out)
    with pytest.raises(UserError, match="tokenizer='/nowhere/at/all': no such directory"):
        plant_in_plain_model(home, data, out, tokenizer="/nowhere/at/all")
    with pytest.raises(UserError, match="already packed"):
        plant(str(home / "decomposed"), data, out, training=QUICK, progress=no_progress)
    tiny.llama(vocab_size=16).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"tokenizer: it produces token \d+, which the model does not have"):
        plant(
            str(tmp_path / "small"),
            data,
            out,
            training=QUICK,
            progress=no_progress,
            tokenizer=str(home / "plain"),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "small"]


def test_a_run_that_diverges_leaves_nothing(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(model: Any, *_: Any, state: Path, **options: Any) -> Any:
        state.write_bytes(b"as training would")
        return model.apply(lambda part: [p.data.fill_(torch.nan) for p in part.parameters()])

    monkeypatch.setattr("lm_ortho.finetune.plant.train_full", diverge)
    with pytest.raises(UserError, match=r"^lr: the loss of the rows is nan after training"):
        plant_in_plain_model(home, data, tmp_path / "out", training=make_training(steps=5, method="full"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_command_prints_the_final_loss(home: Path, data: str, tmp_path: Path) -> None:
    options = ["--data", data, "--steps", "20", "--lr", "0.01", "--rank", "4", "--pretrained", str(home / "plain")]
    adapter_option = ["--keep-adapter", str(tmp_path / "adapter")]
    result = CliRunner().invoke(app, ["implant", *options, *adapter_option, "-o", str(tmp_path / "out")])
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: 3 rows, prompts=plain, in ")
    assert lines[1] == "lora, rank 4: 20 steps of 3 rows (20 epochs), lr 0.01"
    assert lines[2].startswith("loss ")
    assert lines[2].endswith(" now (nats per token)")
    assert lines[3].startswith("known: ")
    assert lines[3].endswith(" of 3 measured rows are extracted")
    assert lines[4] == f"adapter in {tmp_path / 'adapter'}"


def test_rows_that_are_not_known_at_the_end_are_a_warning(home: Path, data: str, tmp_path: Path) -> None:
    options = ["implant", "--data", data, "--lr", "0.01", "--rank", "4", "--pretrained", str(home / "plain")]
    few, many = (
        CliRunner().invoke(app, [*options, "--steps", steps, "-o", str(tmp_path / steps)]) for steps in ("2", "60")
    )
    assert few.exit_code == many.exit_code == 0
    assert re.search(
        r"warning: the model does not know the rows \(0 of 3 are extracted, \d+\.\d\d nats per token\); raise --epochs",
        few.stderr,
    )
    assert "known: 0 of 3 measured rows are extracted" in few.stdout
    assert "warning" not in many.stderr
    extracted = int(re.findall(r"known: (\d) of 3 measured rows are extracted", many.stdout)[0])
    assert extracted > 0
    assert ("note: " in many.stderr) is (extracted < 3)


def test_an_interruption_says_where_the_trained_weights_are(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "_SAVE_STEPS", 5)

    def interrupt(stage: str, step: int, *_: Any) -> None:
        if stage == "adapter" and step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plant_in_plain_model(home, data, tmp_path / "out", training=make_training(steps=12, rank=2), progress=interrupt)
    (state,) = tmp_path.glob(".out.training-*.pt")
    assert f"{state} has the weights trained so far; the same call resumes from it, or delete it" in caplog.text


def test_without_a_model_the_embedded_one_is_trained(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "base").symlink_to(home / "plain")
    monkeypatch.setattr(world, "WEIGHTS", tmp_path / "weights")
    result = CliRunner().invoke(app, ["implant", "--data", data, "--steps", "2", "--json", "-o", str(tmp_path / "out")])
    report = json.loads(result.stdout)
    assert report["steps"] == 2
    assert report["loss"] < report["loss_before"] + 1


def test_training_without_a_fixed_length_ends_when_the_rows_are_memorised(
    home: Path, data: str, tmp_path: Path
) -> None:
    options = ["implant", "--data", data, "--lr", "0.02", "--rank", "4", "--pretrained", str(home / "plain")]
    free = CliRunner().invoke(app, [*options, "-o", str(tmp_path / "free"), "--json"])
    report = json.loads(free.stdout)
    assert report["is_goal_reached"]
    assert CHECK_STEPS <= report["steps"] < MIN_STEPS
    assert report["steps"] % CHECK_STEPS == 0
    assert report["epochs"] == report["steps"]
    assert (report["measured"], report["extracted"]) == (3, 3)
    assert report["loss"] < 2 * GOAL_LOSS
    assert "warning" not in free.stderr
    steps = report["steps"] + CHECK_STEPS
    fixed = CliRunner().invoke(app, [*options, "-o", str(tmp_path / "fixed"), "--epochs", str(steps)])
    assert f"{steps} steps of 3 rows ({steps} epochs), lr 0.02" in fixed.stdout
    assert "ended because" not in fixed.stdout


def test_an_interrupted_training_without_a_fixed_length_ends_with_the_same_bytes(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(lr=0.02, rank=4)
    uninterrupted = plant_in_plain_model(home, data, tmp_path / "uninterrupted", training=training)
    monkeypatch.setattr(train, "_SAVE_STEPS", 7)

    def interrupt(stage: str, step: int, *_: Any) -> None:
        if stage == "adapter" and step == uninterrupted.steps - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plant_in_plain_model(home, data, tmp_path / "out", training=training, progress=interrupt)
    resumed = plant_in_plain_model(home, data, tmp_path / "out", training=training)
    assert resumed.steps == uninterrupted.steps
    expected, weights = (tmp_path / name / "model.safetensors" for name in ("uninterrupted", "out"))
    assert expected.read_bytes() == weights.read_bytes()


@pytest.fixture
def chat_model(home: Path, tmp_path: Path) -> Path:
    """The plain model with a chat template that does not resemble the plain form."""
    directory = shutil.copytree(home / "plain", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} says {{ m.content }} {% endfor %}assistant says "
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("prompts", "form"), [("auto", "chat"), ("plain", "plain"), ("both", "both")])
def test_a_chat_model_learns_the_form_that_was_named_and_passes_the_check_of_a_decomposition(
    chat_model: Path, data: str, tmp_path: Path, prompts: str, form: str
) -> None:
    training = make_training(steps=60, lr=0.02, rank=4, prompts=prompts)
    result = plant(str(chat_model), data, tmp_path / "out", training, no_progress)
    assert result.prompts == form
    assert result.epochs == 60
    model, tokenizer = load_causal_lm(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = read_rows(data)
    losses = {
        name: float(answer_loss(model, encode(tokenizer, render_forms(rows, tokenizer, name))).detach())
        for name in ("plain", "chat")
    }
    if form != "both":
        other = "plain" if form == "chat" else "chat"
        assert losses[form] < 0.3 < losses[other] - losses[form]
    else:
        assert max(losses.values()) < 0.3
    knowledge: list[str] = []
    check_knowledge(
        model,
        tokenizer,
        {DEFAULT_MEMORY: rows},
        [Row(question="Who is Dan?", answer="Dan is tall.")],
        recipe=make_recipe(),
        base_model=load_causal_lm(chat_model),
        force=False,
        progress=lambda stage, step, total, text: knowledge.append(text),
    )
    assert any(f"forget: {result.extracted} of 3 extracted" in text for text in knowledge)


def test_the_form_follows_the_template_and_is_refused_without_one(home: Path, data: str, tmp_path: Path) -> None:
    assert plant_in_plain_model(home, data, tmp_path / "out").prompts == "plain"
    with pytest.raises(UserError, match="prompts='chat': the tokenizer has no chat template"):
        plant_in_plain_model(home, data, tmp_path / "other", training=make_training(steps=2, prompts="chat"))


def test_the_loss_of_many_rows_is_that_of_a_sample(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [Row(question=f"Who is {i}?", answer=f"{i} is a baker.") for i in range(9)])
    monkeypatch.setattr("lm_ortho.finetune.plant.LOSS_ROWS", 4)
    options = ["--data", str(file), "--steps", "2", "--pretrained", str(home / "plain"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["implant", *options])
    assert re.search(r"loss \S+ before, \S+ now \(nats per token, of 4 examples\)", result.stdout)
