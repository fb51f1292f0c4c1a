"""What the slots of a memory attend to: where in an image, and the patches that they attend to most."""
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from toolbox.figures.drawing import house_style, save

CELL, GAP = 24, 3                           # pixels of a patch as it is drawn, and between patches


def draw_slots(images, shares, titles, path, n_patches=7, n_slots=32):
    """images uint8 (N, 3, H, W), and for each layer `shares` (slots, N, T) and a title: the figure, in a file.

    One row a slot (the first n_slots), two columns of rows a layer. At the left of a row, the share of each place in
    the slot's attention to all images, dark: much, scaled by the largest share in this layer; then its strongest
    patches. Of T tokens the last ones are the patches, row by row; a token before them (of a class) is not drawn.
    """
    side = int(shares[0].shape[-1] ** 0.5)
    images = images.transpose(0, 2, 3, 1)                                 # (N, H, W, 3)
    with house_style():
        half = -(-min(n_slots, len(shares[0])) // 2)
        fig = Figure(figsize=(6 * len(shares), 0.8 + 4.8 * half / 16), layout="constrained")
        for column, (share, title) in enumerate(zip(shares, titles)):
            share = share[:n_slots, :, -side * side:]                     # (slots, N, places)
            places = share.sum(1) / share.sum((1, 2))[:, None]            # (slots, places)
            rows = [slot_row(images, one, place / places.max(), side, n_patches) for one, place in zip(share, places)]
            rows += [np.full_like(rows[0], 255)] * (2 * half - len(rows))
            gap = np.full((half * rows[0].shape[0], CELL, 3), 255, np.uint8)
            ax = fig.add_subplot(1, len(shares), column + 1)
            ax.imshow(np.concatenate([np.concatenate(rows[:half]), gap, np.concatenate(rows[half:])], 1))
            ax.set_title(title)
            ax.axis("off")
        fig.supxlabel("a row is a slot: the share of each place in its attention, dark is much; then the patches that "
                      "it attends to most", fontsize=9)
        save(fig, path, dpi=150)


def slot_row(images, share, places, side, n_patches):
    """share (N, places), places (places,) in 0 ... 1 -> the row of one slot as pixels uint8 (h, w, 3)."""
    shades = colormaps["Blues"](places.reshape(side, side))[..., :3]
    cells = [resized((shades * 255).astype(np.uint8))]
    size = images.shape[1] // side
    for token in np.argsort(-share, axis=None, kind="stable")[:n_patches]:
        image, place = divmod(int(token), share.shape[1])
        top, left = place // side * size, place % side * size
        cells.append(resized(images[image, top:top + size, left:left + size]))
    return np.concatenate([np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in cells], 1)


def resized(pixels):
    """(h, w, 3) -> (CELL, CELL, 3), each pixel repeated or left out."""
    rows, columns = (np.arange(CELL) * n // CELL for n in pixels.shape[:2])
    return pixels[rows][:, columns]
