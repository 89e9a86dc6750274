"""The schemas of all settings: every model arg, recipe key and training option is declared here and nowhere else.

lm-eval's ``--model_args``, the options of the command line, the keys of boards, the table in the README and the record
in a checkpoint are made from these classes. The descriptions are the help texts.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lm_ortho.dial import parse_alpha
from lm_ortho.errors import UserError

PromptForm = Literal["auto", "plain", "chat", "both"]


def refuse_truth_value(value: Any) -> Any:
    """The value; ``ValueError`` for true and false, which pydantic would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false (or yes, no, on, off)")
    return value


def spell_out_name(name: Any) -> Any:
    """``name`` as text where lm-eval parsed the name of a file, model or branch as a whole number; else unchanged.

    Raises:
        ValueError: for other numbers and truth values, of which the text that the user wrote is lost.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if isinstance(name, bool | float):
        raise ValueError("lm-eval reads this name as a value of another type; write it as a path, such as ./NAME")
    return name


def check_place(name: Any) -> Any:
    """The name of a file, model or branch as ``spell_out_name`` returns it, after a look whether it is a path.

    Raises:
        ValueError: for a name that cannot be looked up: too long, of an unknown user (``~name``), without permission.
    """
    name = spell_out_name(name)
    if isinstance(name, str):
        try:
            Path(name).expanduser().exists()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot be looked up ({getattr(error, 'strerror', None) or error})") from None
    return name


_RENDERING_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "messages",
    "padding",
    "return_dict",
    "return_tensors",
    "self",
    "tokenize",
    "truncation",
)
"""Arguments of ``apply_chat_template`` of transformers that decide what it returns, and are set by the program."""


def check_template_args(arguments: Any) -> dict[str, Any]:
    """Returns the variables of a chat template as a dictionary; JSON text is parsed.

    Raises:
        UserError: for anything else than a mapping of names to plain values, and for the arguments that decide what
            rendering returns.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UserError(
            'chat_template_args: a mapping of names to values is needed, such as {"date_string": "10 Apr 2025"}'
        )
    for name in arguments:
        if name in _RENDERING_ARGUMENTS:
            raise UserError(f"chat_template_args: {name!r} is set by the evaluation; leave it out")
    try:
        json.dumps(dict(arguments), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise UserError("chat_template_args: values are texts, numbers, true, false, lists or mappings") from None
    return dict(arguments)


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        is_number = not {int, float}.isdisjoint(getattr(annotation, "__args__", (annotation,)))
        return refuse_truth_value(value) if is_number else value


class Recipe(_Schema):
    """The recorded choices of one decomposition; unknown keys are refused.

    The last three reduce the memory (RAM) that the decomposition of a large model needs.
    """

    density: float = Field(
        0.02, gt=0, le=0.5, description="Largest share of the decomposed weights that a memory may move to its stream."
    )
    sieve: str = Field("attribution", description="How the weights of the ortho stream are selected.")
    projection: str = Field("gptq_ordered", description="How the other weights are rounded to the lattice.")
    edit: str = Field("optimised", description="What the base stream holds at the positions of the ortho stream.")
    bits: int = Field(4, description="Bits per weight of the base stream: 3, 4 or 8, or 16 for no lattice.")
    group_size: int = Field(64, description="Number of weights of a row that share a scale, a multiple of 8.")
    targets: str = Field(
        "", description="Layers to decompose: `+`-separated globs; all linear layers but the LM head without it."
    )
    prompts: PromptForm = Field(
        "auto",
        description="Form of the questions: `plain`, `chat` or `both`; `auto` is both where the tokenizer has a chat "
        "template, else plain.",
    )
    system_instruction: str = Field(
        "", description="Message of the system before the question of a chat, as lm-eval's `--system_instruction`."
    )
    chat_template_args: dict[str, Any] = Field(
        {},
        description="Variables of the chat template such as `date_string`, a mapping or JSON; also of the evaluation.",
    )
    recall: bool = Field(
        False, description="Look for further subjects that the model knows, and retain what it says about them."
    )
    steps: int = Field(
        800,
        ge=10,
        lt=2**31,
        description="Number of steps of the optimised edit, 10 at least. The attribution pass takes a tenth as many, "
        "but 30 at least and never more than the edit. A base model that is known learns the retain rows first, from "
        "as many tokens as the edit reads at most.",
    )
    batch_rows: int = Field(
        12,
        ge=1,
        lt=2**20,
        description="Number of forget rows in a step of attribution and edit; there are twice as many retain rows.",
    )
    lr: float = Field(
        0.032,
        gt=0,
        le=1,
        description="Peak learning rate of the edit: how much one step in all coordinates changes the outputs of all "
        "layers on retain rows, as a share of them. A step is half a step of the lattice at most.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all random draws of the decomposition.")
    groups: int = Field(
        1,
        ge=1,
        lt=2**31,
        description="Number of parts in which the model goes through attribution, to need less memory.",
    )
    states: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the optimiser states of attribution."
    )
    recompute: bool = Field(
        False, description="Use gradient checkpointing: compute activations again in the backward pass."
    )

    @field_validator("system_instruction", mode="before")
    @classmethod
    def _read_instruction(cls, instruction: Any) -> Any:
        return "" if instruction is None else instruction  # None is the value without one in lm-eval

    @field_validator("chat_template_args", mode="before")
    @classmethod
    def _read_template_args(cls, arguments: Any) -> Any:
        return check_template_args({} if arguments is None else arguments)

    @property
    def chat_options(self) -> dict[str, Any]:
        """The keyword arguments of ``data.chat.render_forms`` beside the form."""
        return {"system_instruction": self.system_instruction, "chat_template_args": self.chat_template_args}

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int) -> int:
        if bits not in (3, 4, 8, 16):
            raise ValueError("must be one of 3, 4, 8, 16")
        return bits

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, group_size: int) -> int:
        if not 8 <= group_size <= 2**16 or group_size % 8:  # no layer of any model has longer rows
            raise ValueError("must be a positive multiple of 8, at most 65536")
        return group_size


def count_sieve_steps(steps: int) -> int:
    """Number of steps of an attribution pass before an edit of ``steps``: a tenth, but 30 at least, and never more.

    A pass of fewer steps does not come far enough to see which weights the memory needs (docs/decisions/0038).
    """
    return min(steps, max(30, steps // 10))


class ModelSource(_Schema):
    """Where a model with a memory comes from, and the rows that say what the memory is."""

    pretrained: str | None = Field(
        None, description="Hub id or directory of the model, or a decomposed checkpoint; the embedded model without it."
    )
    peft: str | None = Field(None, description="Adapter with the memory, merged in BF16.")
    base: str = Field(
        "auto",
        description="The model before fine-tuning: `auto` (= `pretrained` where `peft` is merged), `none` (merged "
        "weights only), or a path.",
    )
    forget: str | None = Field(
        None,
        description="Forget set, what alpha=0 must not know: a file of rows, `hub:name:config:split`, or several with "
        "a name each, `name:source+name:source`.",
    )
    retain: str | None = Field(
        None, description="Retain set, what must stay; some of it of the same form as the forget set, about others."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    trust_remote_code: bool = Field(False, description="Run Python code from the repository of the model.")

    @field_validator("forget", "retain", mode="before")
    @classmethod
    def _spell_out_name(cls, name: Any) -> Any:
        return spell_out_name(name)  # the reader of rows looks them up

    @field_validator("pretrained", "peft", "revision", mode="before")
    @classmethod
    def _check_place(cls, name: Any) -> Any:
        return check_place(name)

    @field_validator("base", mode="before")
    @classmethod
    def _spell_out_none(cls, base: Any) -> Any:
        return "none" if base is None else check_place(base)  # lm-eval parses ``base=none`` as None


class ModelSpec(ModelSource):
    """A request for a model with a dial: its source, the recipe of its decomposition, and how it is loaded.

    ``recipe.model_fields_set`` names what the user chose; the rest is the default recipe.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: Any = Field(None, description="A model object instead of `pretrained`; from Python only.")
    alpha: float | dict[str, float] = Field(
        0.0,
        description="The dial, 0 (forget) to 1 (remember), or one for each memory, `name:value+name:value`; a memory "
        "that is not named stays off.",
    )
    kernel: str = Field("auto", description="Implementation of the layers: `auto`, `reference`, `cpu` or `triton`.")
    fresh: bool = Field(False, strict=True, description="Decompose again instead of using a shipped or cached result.")
    force: bool = Field(
        False, strict=True, description="Decompose a model although nothing says that it knows the forget rows."
    )
    held_out: str = Field(
        "auto",
        description="Retain rows that the calibration does not read and `retain_set` measures: `auto` (a tenth, 100 at "
        "most, by subject, of 100 rows or more), `none`, or a file of rows.",
    )
    gguf_file: str | None = Field(
        None, description="GGUF file in the directory or repository of the model, which is dequantised."
    )
    tokenizer: Any = Field(
        None, description="Tokenizer to use instead of the one in the directory of the adapter or of the model."
    )
    subfolder: str = Field("", description="Folder of the model inside its repository.")
    token: str | None = Field(None, description="Access token for the hub.")
    recipe: Recipe = Field(default_factory=lambda: Recipe.model_validate({}), description="The recipe.")

    @field_validator("held_out", mode="before")
    @classmethod
    def _spell_out_no_rows(cls, held_out: Any) -> Any:
        return "none" if held_out is None else spell_out_name(held_out)  # lm-eval parses ``held_out=none`` as None

    @field_validator("tokenizer", "subfolder", "gguf_file", mode="before")
    @classmethod
    def _check_loading_place(cls, name: Any) -> Any:
        return check_place(name)

    @field_validator("alpha", mode="before")
    @classmethod
    def _parse_alpha(cls, alpha: Any) -> float | dict[str, float]:
        for value in alpha.values() if isinstance(alpha, Mapping) else (alpha,):
            refuse_truth_value(value)
        return parse_alpha(alpha)

    @property
    def loading_options(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained`` of ``pretrained``; only those that differ from the default."""
        names = ("revision", "subfolder", "token", "trust_remote_code", "gguf_file")
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value}

    @property
    def access_options(self) -> dict[str, Any]:
        """The same for any other model than ``pretrained``, to which its revision and subfolder do not apply."""
        token = {"token": self.token} if self.token else {}
        return {"trust_remote_code": self.trust_remote_code, **token}


class Training(_Schema):
    """The choices of one fine-tune that plants a memory; None is decided by model and data."""

    method: Literal["lora", "full"] = Field("lora", description="`lora` (an adapter, merged) or `full` (all weights).")
    rank: int = Field(32, ge=1, lt=2**31, description="Rank of the LoRA adapter.")
    lr: float | None = Field(
        None, gt=0, lt=1, description="Peak learning rate; without it one that suits method and width."
    )
    prompts: PromptForm = Field(
        "auto",
        description="Form of the questions: `plain`, `chat` or `both`; `auto` is chat where the tokenizer has a chat "
        "template, else plain.",
    )
    steps: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="Number of steps; without it, and without --epochs, training ends when the rows are memorised, "
        "after 20 passes over them or 200 steps, whichever is more, at the latest.",
    )
    epochs: float | None = Field(None, gt=0, description="Number of passes over the rows, instead of --steps.")
    batch_rows: int = Field(16, ge=1, lt=2**31, description="Number of rows in a step.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the initial adapter weights and of the order of the rows."
    )


MODEL_ARGS = tuple(name for name in (*ModelSpec.model_fields, *Recipe.model_fields) if name not in ("model", "recipe"))
"""Names of all model args that lm-ortho declares; those of ``--model hf`` come on top."""
Schema = TypeVar("Schema", bound=BaseModel)


def make_recipe(**values: Any) -> Recipe:
    """A validated ``Recipe``; ``UserError`` names the first bad argument, its value and the allowed range."""
    return validate(Recipe, values)


def make_spec(recipe: Recipe | Mapping[str, Any] | None = None, **values: Any) -> ModelSpec:
    """A validated ``ModelSpec``; ``recipe`` holds what the user chose. Raises ``UserError`` as ``make_recipe`` does.

    A ``pretrained`` that is a path becomes text, any other object becomes ``model``.
    """
    if isinstance(values.get("pretrained"), os.PathLike):
        values["pretrained"] = str(values["pretrained"])
    if not isinstance(values.get("pretrained"), str | int | float | None):  # the schema refuses or spells out numbers
        values["model"] = values.pop("pretrained")
    if isinstance(recipe, Mapping):
        recipe = make_recipe(**recipe)
    return validate(ModelSpec, values if recipe is None else {**values, "recipe": recipe})


def split_model_args(args: Mapping[str, Any]) -> tuple[ModelSpec, dict[str, Any]]:
    """The specification in a mapping of model args, and the model args that are not declared here.

    ``enable_thinking`` is a variable of the chat template, too: ``hf`` adds it to ``chat_template_args``.
    """
    if args.get("enable_thinking") is not None and args.get("pretrained") is not None:
        template_args = check_template_args(args.get("chat_template_args") or {})
        args = {**args, "chat_template_args": {**template_args, "enable_thinking": args["enable_thinking"]}}
    recipe = {name: args[name] for name in Recipe.model_fields if name in args}
    source = {name: args[name] for name in MODEL_ARGS if name in args and name not in recipe}
    return make_spec(recipe, **source), {name: value for name, value in args.items() if name not in MODEL_ARGS}


def make_training(**values: Any) -> Training:
    """A validated ``Training``; ``UserError`` as for a recipe, and for both ``steps`` and ``epochs``."""
    training = validate(Training, values)
    if training.steps and training.epochs:
        raise UserError(f"steps={training.steps} and epochs={training.epochs:g}: give one of them")
    return training


def validate(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """An instance of ``schema``; ``UserError`` names the first bad value, what was found and what is allowed."""
    try:
        return schema(**values)
    except ValidationError as error:
        raise UserError(describe_validation_error(error)) from None


def describe_validation_error(error: ValidationError) -> str:
    """The first value that a schema refused, in one line: its key, what was found, what is allowed."""
    first = error.errors()[0]
    name, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name} is missing"
    if isinstance(first.get("ctx", {}).get("error"), UserError):  # it names its argument itself
        return message if not name or message.startswith(name) else f"{name}: {message}"
    value = first["input"]
    if first["type"] == "value_error" and isinstance(value, Mapping):  # a validator of ours that compares several keys
        return f"{name}: {message}" if name else message
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return f"{name}={text}: {message}"


def format_model_args(args: Mapping[str, Any]) -> str:
    """Model args as lm-eval takes them: ``name=value`` with commas, or JSON where a value contains one of ``,={"``."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in args.items()}
    is_plain = not any(mark in str(value) for value in values.values() for mark in ',={"')
    return ",".join(f"{name}={value}" for name, value in values.items()) if is_plain else json.dumps(values)
