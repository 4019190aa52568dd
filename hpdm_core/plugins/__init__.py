"""Plugins: found, loaded, checked, named and resolved. `build_plugins` is the way in.

A plugin is a module with functions marked ``@hookimpl`` (`hpdm_core.hookspecs` lists the hooks), or a package
that names such submodules in ``PLUGIN_MODULES`` and may ship a folder ``presets``.
"""

from hpdm_core.plugins.families import FAMILIES, Family
from hpdm_core.plugins.manager import PluginInfo, Plugins, Registration, build_plugins

__all__ = ["FAMILIES", "Family", "PluginInfo", "Plugins", "Registration", "build_plugins"]
