"""What the slots of a memory attend to: where in an image, and the patches that they attend to most."""
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from toolbox.figures.drawing import house_style, save

CELL, GAP, FRAME = 26, 3, 128               # pixels of a patch as it is drawn, and between patches; gray of its frame
CAPTION = ("a row is a slot: the share of each place in its attention, dark is much; then the patches that it attends "
           "to most, one of each image")


def draw_slots(images, shares, titles, path, n_patches=7, n_slots=32):
    """images uint8 (N, 3, H, W), and for each layer `shares` (slots, N, T) and a title: the figure, in a file.

    One row a slot (the first n_slots), two columns of rows a layer. At the left of a row, the share of each place in
    the slot's attention to all images, dark: much, scaled by the largest share in this layer; then its strongest
    patches, at most one of each different image. Of T tokens the last ones are the patches, row by row; a token before
    them (of a class or a question) is not drawn.
    """
    side = int(shares[0].shape[-1] ** 0.5)
    images = images.transpose(0, 2, 3, 1)                                 # (N, H, W, 3)
    scene = np.unique(images.reshape(len(images), -1), axis=0, return_inverse=True)[1].reshape(-1)     # (N,)
    half = -(-min(len(shares[0]), n_slots) // 2)                          # rows below each other
    with house_style():
        fig = Figure(figsize=(5.5 * len(shares), 0.9 + 0.3 * half), layout="constrained")
        for column, (share, title) in enumerate(zip(shares, titles)):
            share = share[:n_slots, :, -side * side:]                     # (slots, N, places)
            places = share.sum(1) / share.sum((1, 2))[:, None]            # (slots, places)
            rows = [slot_row(images, scene, one, place / places.max(), side, n_patches)
                    for one, place in zip(share, places)]
            rows += [np.full_like(rows[0], 255)] * (2 * half - len(rows))
            gap = np.full((half * rows[0].shape[0], CELL, 3), 255, np.uint8)
            ax = fig.add_subplot(1, len(shares), column + 1)
            ax.imshow(np.concatenate([np.concatenate(rows[:half]), gap, np.concatenate(rows[half:])], 1))
            ax.set_title(title)
            ax.axis("off")
        fig.supxlabel(CAPTION if len(shares) > 1 else CAPTION.replace("; ", ";\n"), fontsize=9)
        save(fig, path, dpi=100)


def slot_row(images, scene, share, places, side, n_patches):
    """scene (N,): equal for equal images; share (N, P), places (P,) in 0 ... 1 -> a slot's row, uint8 (h, w, 3)."""
    shades = colormaps["Blues"](places.reshape(side, side))[..., :3]
    cells, seen = [framed((shades * 255).astype(np.uint8))], set()
    size = images.shape[1] // side
    for token in np.argsort(-share, axis=None, kind="stable"):
        image, place = divmod(int(token), share.shape[1])
        if scene[image] not in seen and len(seen) < n_patches:
            seen.add(scene[image])
            top, left = place // side * size, place % side * size
            cells.append(framed(images[image, top:top + size, left:left + size]))
    cells += [np.full_like(cells[0], 255)] * (1 + n_patches - len(cells))          # fewer images than patches
    return np.concatenate([np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in cells], 1)


def framed(pixels):
    """(h, w, 3) -> (CELL, CELL, 3), each pixel repeated or left out, in a gray frame."""
    rows, columns = (np.arange(CELL - 2) * n // (CELL - 2) for n in pixels.shape[:2])
    return np.pad(pixels[rows][:, columns], ((1, 1), (1, 1), (0, 0)), constant_values=FRAME)
