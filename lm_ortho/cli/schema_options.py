"""Options of commands, made from the schemas of ``lm_ortho.config``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Command = Callable[..., None]


def with_fields(schema: type[BaseModel], argument: str, *, only: Iterable[str] = ()) -> Callable[[Command], Command]:
    """Decorator that gives a command an option for each field of ``schema``, or for ``only`` some of them.

    The command gets the values that the user named as the dictionary ``argument``; the schema checks them and has the
    defaults. Several of these decorators may stand above one command.
    """
    fields = {name: schema.model_fields[name] for name in only or schema.model_fields}

    def add_options(command: Command) -> Command:
        parameters = [p for p in signature(command, eval_str=True).parameters.values() if p.name != argument]
        passes_context = any(parameter.name == "context" for parameter in parameters)
        if not passes_context:
            parameters.insert(0, Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context))
        parameters += [_option(name, field) for name, field in fields.items()]

        @wraps(command)
        def run(context: typer.Context, **arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in fields}
            sources = {name: context.get_parameter_source(name) for name in fields}
            named = {name: value for name, value in values.items() if getattr(sources[name], "name", "") != "DEFAULT"}
            if passes_context:
                arguments["context"] = context
            command(**arguments, **{argument: named})

        run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return add_options


def _option(name: str, field: FieldInfo) -> Parameter:
    flag = f"--{name.replace('_', '-')}"
    names = [flag] if field.annotation is bool else []  # a switch without its opposite
    default = "" if field.default == {} else field.default  # a mapping is given as JSON
    option = typer.Option(*names, help=field.description, show_default=default not in (None, "", False))
    kind: Any = next((kind for kind in (bool, int, float) if kind in _union_members(field.annotation)), str)
    if default is None:
        kind = kind | None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return getattr(annotation, "__args__", (annotation,))
