"""Config sections: strict, frozen, and complete once built."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, create_model

from ssl_methods import plugins


class Section(BaseModel):
    """A part of a config file: unknown keys, wrong types and infinities are errors, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class Plugin(BaseModel):
    """A plug-in by file name, with every parameter of its constructor resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Return the section as it stands in YAML: the name and the parameters side by side."""
        return {"name": self.name, **self.params}


PluginField = Annotated[Plugin, PlainSerializer(Plugin.flat, return_type=dict[str, Any])]


@cache
def plugin_section(package: str, name: str) -> type[Section]:
    """Build the config section of a plug-in from the keyword-only parameters of its constructor.

    Args:
        package: dotted name of the package that holds the plug-ins, a file each.
        name: file name of the plug-in.

    Raises:
        ValueError: no such plug-in; the message lists those that exist.
    """
    plugin: Any = plugins.load(package, name)
    hints = get_type_hints(plugin.__init__, include_extras=True)
    keyword_only = [p for p in inspect.signature(plugin).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is inspect.Parameter.empty else p.default) for p in keyword_only
    }
    return create_model(f"{name}_section", __base__=Section, **fields)


def resolve_plugin(package: str, values: Mapping[str, Any]) -> Plugin:
    """Check a plug-in's section against its constructor and fill in the defaults.

    Raises:
        ValueError: `name` is missing or names no plug-in of the package.
        pydantic.ValidationError: a parameter is unknown, of the wrong type or out of range.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ValueError(f"needs a `name`; one of {', '.join(plugins.names(package))}")
    name: str = values["name"]
    section = plugin_section(package, name)
    params = section.model_validate({key: value for key, value in values.items() if key != "name"})
    return Plugin(name=name, params=params.model_dump(mode="json"))
