r"""A symmetric matrix too large to form, from its products with a few random vectors.

The batch mean of Hessians with m = 10,000 has 10^8 entries and would take 10,000 Hessian-vector products. But a damped
inverse needs little of it: the eigenvalues well above the damping with their vectors, and one number for the rest:
``C ~ U diag(l) U' + s (I - U U')``.

Let W (r, m) be r probes of random signs. Y = W C is all that is computed from C (a single pass: Halko, Martinsson and
Tropp, SIAM Review 2011, section 5.5). Let Q (r/2, m) be the leading right singular vectors of Y. If C = Q' B Q then

    Y Q' = W C Q' = (W Q') B,

r equations for the r/2 columns of B: least squares, exact where rank C <= r/2. Of the rest, which Q leaves out, only a
size s is needed. A multiple ``s (I - U U')`` of the identity in m >> r dimensions keeps random vectors nearly
orthogonal. So the remaining singular values of Y are all near ``s sqrt(m)``, and s is their root mean square over
sqrt(m). (Where the rest is no multiple of the identity, or is indefinite, s is the size of its eigenvalues and not
their mean, which may cancel. The repair replaces eigenvalues by their sizes anyway.)

Y is *linear* in C. Sums of Y over samples, ranks and batches belong to the same sums of C, so the running mean of Y is
exactly that of the running mean of C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._errors import OutputsTooLargeError
from newton_plugin._linalg.damped_inverse import Inverse
from newton_plugin._runtime.transforms import outside_transforms

__all__ = ["RANK", "Sketch", "probes_for", "random_signs", "sketch", "sketch_of_rows"]

RANK = 16  # of the low-rank part; twice as many probes

_MOST_PROBES = 4
_PROBES: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


@dataclass(frozen=True)
class Sketch:
    """``C ~ U' diag(l) U + s (I - U' U)``.

    Attributes:
        vectors: U, (r, m), orthonormal rows.
        values: l, (r,).
        rest: s, no dimensions.
        size: root-mean-square eigenvalue of C, no dimensions.
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor
    size: Tensor

    matrix = None

    def scale(self) -> Tensor:
        return self.size

    def inverse(self, damping: Tensor, power: float) -> Inverse:
        # |l| at once and not l + d for small negative l: krylov.py says why.
        scaled = (torch.cat([self.values, self.rest.reshape(1)]).abs() + damping).pow(-power)
        inside, outside = scaled[:-1], scaled[-1]
        return lambda g: outside * g + ((g @ self.vectors.mT) * (inside - outside)) @ self.vectors

    def extremes(self) -> tuple[Tensor, Tensor]:
        values = torch.cat([self.values, self.rest.reshape(1)])
        return values.min(), values.max()


def random_signs(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    """+1 and -1, the same at every call on one kind of device; the user's random state is not touched."""
    if torch.compiler.is_compiling():
        raise OutputsTooLargeError(
            "outputs of so many features need random probes for their Hessian, which torch.compile cannot follow. Use "
            "curvature='fisher' or 'norm', name fewer features by feature_dims, or take the step outside of what is "
            "compiled."
        )
    with outside_transforms():
        generator = torch.Generator(like.device).manual_seed(seed)
        signs = torch.randint(2, shape, generator=generator, device=like.device)
    return signs.to(like) * 2 - 1


def probes_for(like: Tensor, rank: int = RANK) -> Tensor:
    """W, (2 rank, m), for rows of m features; not to be written into.

    W is drawn on the CPU whatever the device: Y is kept from step to step and in checkpoints, and two devices draw
    different numbers from one seed. W is kept so that no step waits for the copy.
    """
    key = (2 * rank, like.shape[-1], like.dtype, like.device)
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # what is made from a tracer's tensor is not kept
        return _draw(*key)
    probes = _PROBES.get(key)
    if probes is None:
        probes = _draw(*key)
        if type(probes) is Tensor:
            while len(_PROBES) >= _MOST_PROBES:
                del _PROBES[next(iter(_PROBES))]  # the oldest
            _PROBES[key] = probes
    return probes


def _draw(count: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # An inference tensor could not be used in a later step that is differentiated.
    with torch.inference_mode(False), outside_transforms():
        return random_signs((count, m), torch.empty(0, dtype=dtype, device="cpu")).to(device)


def sketch(probes: Tensor, products: Tensor) -> Sketch:
    """From W and Y = W C, both (2 r, m) with r < m, the best C of rank r plus a multiple of the identity."""
    count, m = probes.shape
    rank = count // 2
    _, singular, directions = torch.linalg.svd(products, full_matrices=False)
    vectors = directions[:rank]
    core = torch.linalg.lstsq(probes @ vectors.mT, products @ vectors.mT).solution
    values, rotation = torch.linalg.eigh((core + core.mT) / 2)
    rest = torch.linalg.vector_norm(singular[rank:]) / ((count - rank) * m) ** 0.5
    # E |C w|^2 = ||C||_F^2 for random signs w.
    size = torch.linalg.vector_norm(products) / (count * m) ** 0.5
    return Sketch(rotation.mT @ vectors, values, rest, size)


def sketch_of_rows(rows: Tensor, gram: Tensor, weight: Tensor) -> Sketch:
    """``C = w G'G`` exactly, from rows G (N, m) and ``gram = w GG' = V diag(l) V'``: U is ``sqrt(w / l) V' G``, s 0."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1]  # the others have no direction of their own
    scaled = torch.where(kept, (weight / torch.where(kept, values, 1.0)).sqrt(), 0.0)
    size = torch.linalg.vector_norm(values) / rows.shape[1] ** 0.5
    values = torch.where(kept, values, 0.0)
    return Sketch(scaled.unsqueeze(-1) * (vectors.mT @ rows), values, values.new_zeros(()), size)
