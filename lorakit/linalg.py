"""Linear algebra on thin factors. Nothing here forms the m x n product of a pair."""

from typing import NamedTuple

import torch
from torch import Tensor


class ThinSVD(NamedTuple):
    """U diag(S) Vh of a product B A, singular values falling."""

    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    Vh: Tensor  # (k, n)


def product_svd(A: Tensor, B: Tensor) -> ThinSVD:
    """The SVD of B A, for A (r, n) and B (m, r), in float64.

    QR of both factors leaves an SVD of a small core, O((m + n) r^2) instead of O(m n min(m, n)):

        B = Q_B R_B,   A^T = Q_A R_A,   B A = Q_B (R_B R_A^T) Q_A^T

    float64, since a product of the triangles squares what single precision loses.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return ThinSVD(Q_B @ U, S, Vh @ Q_A.T)
