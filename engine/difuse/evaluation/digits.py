"""A judge for generated digits: a support vector classifier that has seen only real ones."""
import torch

from difuse.files import require_extras


def digit_classifier(images, labels):
    """Fit the judge on real digits.

    images [N,1,8,8] float in [-1,1], labels [N] int. Returns a scikit-learn classifier for `class_share`.
    Raises ImportError where scikit-learn is not installed.
    """
    require_extras("judging digits", "sklearn")
    from sklearn.svm import SVC

    # gamma for pixels of 0..16: scikit-learn's own digits example uses 0.001; 0.0005 and 0.001 score alike held out
    return SVC(gamma=0.001, C=10.0).fit(_pixels(images), torch.as_tensor(labels).numpy())


def class_share(classifier, images, labels):
    """The share, 0..1, of images [N,1,8,8] that the classifier takes for their label [N]."""
    labels = torch.as_tensor(labels).numpy()
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"class_share: {len(images)} images and {len(labels)} labels; expected as many, and some")
    return float((classifier.predict(_pixels(images)) == labels).mean())


def _pixels(images):
    """[-1,1] -> the 0..16 that scikit-learn's digits have, flattened to [N,64]; clipped as a screen would."""
    return ((torch.as_tensor(images).float().clamp(-1, 1) + 1) * 8).flatten(1).numpy()
