"""Loads torch's forward-mode rules once: torch 2.13 compiles them with its own, deprecated, torch.jit.script."""

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
