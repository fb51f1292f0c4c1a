"""Some test images, with the class that the model predicts for each."""
from matplotlib.figure import Figure

from toolbox.figures.drawing import house_style, save


def draw_predictions(images, labels, probabilities, class_names, path, columns=8, captions=None):
    """images uint8 (N, 3, H, W), labels (N,), probabilities (N, n_classes). Wrong answers name the right class, too.

    captions: what stands above each answer, such as a question.
    """
    rows = -(-len(images) // columns)
    with house_style():
        fig = Figure(figsize=(1.25 * columns, 1.5 * rows), layout="constrained")
        for i, (image, label, p) in enumerate(zip(images, labels, probabilities)):
            ax, k = fig.add_subplot(rows, columns, i + 1), int(p.argmax())
            ax.axis("off")
            ax.imshow(image.transpose(1, 2, 0))
            truth = "" if k == label else f"\nis {class_names[label]}"
            question = f"{captions[i]}:\n" if captions else ""
            ax.set_title(f"{question}{class_names[k]} {p[k]:.0%}{truth}", fontsize=8,
                         color="#cc3311" if truth else "black")
        save(fig, path, dpi=110)
