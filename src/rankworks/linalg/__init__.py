"""Pure tensor functions: decompositions, products and projections, with nothing of models or methods in them."""

from rankworks.linalg.bilateral import bilateral_residual
from rankworks.linalg.lu import UnitLU, unit_lu
from rankworks.linalg.svd import fix_signs, randomised_svd, svd_of_product, truncated_svd

__all__ = ["UnitLU", "bilateral_residual", "fix_signs", "randomised_svd", "svd_of_product", "truncated_svd", "unit_lu"]
