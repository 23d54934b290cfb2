"""Loss landscapes: surfaces along random directions, average- and worst-case sharpness, top Hessian eigenvalues.

from flatops import landscape
surface = landscape.surface(model, loss_fn, batches)
landscape.plot({"mine": surface}, "surface.png")
"""

from .hessian import Eigenvalue, top_eigenvalues
from .plots import plot
from .sharpness import Sharpness, sharpness
from .surface import Surface, direction, surface

__all__ = ["Eigenvalue", "Sharpness", "Surface", "direction", "plot", "sharpness", "surface", "top_eigenvalues"]
