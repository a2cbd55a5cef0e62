"""Methods of one instance replaced for a while, and put back exactly.

``vars(module)[name] = wrapper`` shadows a method for this object only; the class, and every other instance,
stays as it is. Four parties then look at the shadow, and each must see what it would have seen without it:

* Lightning inspects a step's signature and code after unwrapping ``__wrapped__`` *exactly once*. So the
  wrapper's ``__wrapped__`` is what one unwrapping of the *original* gives, not the original: a user's own
  decorated step keeps its signature.
* ``copy``, ``deepcopy`` and ``pickle`` would carry a wrapper still bound to the first object (weight averaging
  would then train the wrong network). All three ask the object for ``__getstate__``, so that is shadowed too,
  by one that leaves the shadows out.
* Whoever wraps on top of us keeps a reference. Removing must not throw their wrapper away, so ours turns into
  a plain call of the original.
* The instance ``__dict__`` after removal is equal to the one before, including a step that somebody else had
  put there earlier (a compiled one, say).
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
        around: for each method name a function ``f(original, *args, **kwargs)`` that is called in its place;
            ``original`` is the bound method as it was.
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
        """What the module's own ``__getstate__`` gives, without our shadows."""
        state = dict(vars(self._module)) if original is None else original()
        if isinstance(state, dict):
            state = dict(state)
            self._restore(state)
        return state

    def _restore(self, attributes: dict[str, Any]) -> None:
        for name, ours in self._ours.items():
            if attributes.get(name) is not ours:
                continue  # somebody wrapped on top of us, or has removed us already
            if self._before[name] is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = self._before[name]

    def remove(self) -> None:
        """Put everything back. Calling it twice does nothing."""
        self._active = False
        self._restore(vars(self._module))
