"""Replaces methods of one instance for a while, and restores them exactly.

``vars(module)[name] = wrapper`` shadows a method for this object only; the class and every other instance stay as they
are. Four others look at the shadow, and each must see what it would have seen without it:

* Lightning inspects a step's signature and code after unwrapping ``__wrapped__`` *exactly once*. The wrapper's
  ``__wrapped__`` is therefore what one unwrapping of the *original* gives, and not the original: a user's own decorated
  step keeps its signature.
* ``copy``, ``deepcopy`` and ``pickle`` would copy a wrapper that is still bound to the first object (weight averaging
  would then train the wrong network). All three call ``__getstate__`` of the object. It is shadowed too, by one that
  leaves the shadows out.
* Whoever wraps our wrapper keeps a reference to it. Removing ours must not remove theirs: ours becomes a plain call of
  the original.
* The ``__dict__`` of the instance after removal is equal to the one before, with a step that somebody else had put
  there earlier (a compiled one, say).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["MethodPatch"]

Method = Callable[..., Any]

_ABSENT = object()


class MethodPatch:
    """Shadow methods of ``module`` until :meth:`remove`.

    Args:
        module: the object whose methods are shadowed.
        around: for each method's name a function ``f(original, *args, **kwargs)`` that is called in its place;
            ``original`` is the bound method that was there.
    """

    def __init__(self, module: nn.Module, around: dict[str, Method]) -> None:
        self._module = module
        self._active = True
        self._before: dict[str, Any] = {}
        self._ours: dict[str, Method] = {}
        getstate = module.__getstate__ if hasattr(module, "__getstate__") else None
        for name, function in around.items():
            self._shadow(name, self._wrap(getattr(module, name), function))
        self._shadow("__getstate__", functools.partial(self._getstate, getstate))

    def _shadow(self, name: str, wrapper: Method) -> None:
        attributes = vars(self._module)
        self._before[name] = attributes.get(name, _ABSENT)
        self._ours[name] = attributes[name] = wrapper

    def _wrap(self, original: Method, function: Method) -> Method:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            return function(original, *args, **kwargs)

        vars(wrapper)["__wrapped__"] = getattr(original, "__wrapped__", original)
        return wrapper

    def _getstate(self, original: Callable[[], Any] | None) -> Any:
        """What the module's own ``__getstate__`` returns, without our shadows."""
        state = dict(vars(self._module)) if original is None else original()
        if isinstance(state, dict):
            state = dict(state)
            self._restore(state)
        return state

    def _restore(self, attributes: dict[str, Any]) -> None:
        for name, ours in self._ours.items():
            if attributes.get(name) is not ours:
                continue  # somebody has wrapped our wrapper, or has removed it already
            if self._before[name] is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = self._before[name]

    def remove(self) -> None:
        """Restore the methods. A second call does nothing."""
        self._active = False
        self._restore(vars(self._module))
