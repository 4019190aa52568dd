"""Plugins: how they are found, loaded and checked, and how a name becomes a part. Start with `build_plugins`.

A plugin is a module with functions marked ``@hookimpl`` (`hpdm_core.hookspecs` lists the hooks), or a package
that names such submodules in ``PLUGIN_MODULES`` and may ship a folder ``presets``.
"""

from hpdm_core.plugins.families import FAMILIES, Family
from hpdm_core.plugins.manager import PluginInfo, Plugins, Registration, build_plugins

__all__ = ["FAMILIES", "Family", "PluginInfo", "Plugins", "Registration", "build_plugins"]
