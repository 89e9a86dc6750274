"""Options of commands, made from the schemas of ``lm_ortho.config``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Command = Callable[..., None]


def with_fields(schema: type[BaseModel], argument: str) -> Callable[[Command], Command]:
    """Decorator that gives a command an option for each field of ``schema``.

    The command gets those that the user named as the dictionary ``argument``; the schema checks them and has the rest.
    """

    def add(command: Command) -> Command:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != argument]
        context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *own, *(_option(name, field) for name, field in schema.model_fields.items())]

        @wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            fields = {name: given.pop(name) for name in schema.model_fields}
            sources = {name: context.get_parameter_source(name) for name in fields}
            named = {name: value for name, value in fields.items() if getattr(sources[name], "name", "") != "DEFAULT"}
            command(**given, **{argument: named})

        run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return add


def _option(name: str, field: FieldInfo) -> Parameter:
    names = [f"--{name.replace('_', '-')}"] if field.annotation is bool else []  # a switch without its opposite
    shown = typer.Option(*names, help=field.description, show_default=field.default not in (None, "", False))
    kind: Any = next((kind for kind in (bool, int, float) if kind in _parts(field.annotation)), str)
    if field.default is None:
        kind = kind | None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, shown])


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return getattr(annotation, "__args__", (annotation,))
