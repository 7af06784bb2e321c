"""How good the samples are: Frechet distance, recognised digits; and pictures of them."""
from difuse.evaluation.digits import class_share, digit_classifier
from difuse.evaluation.frechet import frechet_distance
from difuse.evaluation.pictures import image_grid, plot_loss, save_png

__all__ = ["class_share", "digit_classifier", "frechet_distance", "image_grid", "plot_loss", "save_png"]
