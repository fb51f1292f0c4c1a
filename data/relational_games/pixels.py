"""What is on a board, from its pixels alone: which cells have objects, of which colour and of which shape."""
import numpy as np

KINDS = ("same", "colour", "shape", "neither")     # what two objects share: both, the colour or the shape alone, none


def objects(images, sprites):
    """uint8 (n, 36, 36, 3) -> three arrays (n, 9), cell by cell: is there an object, its colour, its shape (integers).

    The shape of a pento or hexo is its mask of 3 x 3 blocks. Stripes, columns A|B|A, have no shape: there colour and
    shape are the colours of A and of B.
    """
    n = len(images)
    cells = images.reshape(n, 3, 12, 3, 12, 3).swapaxes(2, 3).reshape(n, 9, 12, 12, 3)
    blocks = cells[:, :, 2:10:3, 2:10:3].astype(np.int64) @ [1, 1 << 8, 1 << 16]   # middle pixels: (n, 9, 3, 3)
    if sprites == "stripes":
        return blocks.any((2, 3)), blocks[:, :, 0, 0], blocks[:, :, 0, 1]
    masks = (blocks > 0).reshape(n, 9, 9) @ (1 << np.arange(9))
    return masks > 0, blocks.max((2, 3)), masks


def kinds_of_pairs(images, sprites):
    """-> int64 (n, 9, 9): what the objects in two cells share, an index into KINDS; -1 where there are not two."""
    present, colour, shape = objects(images, sprites)
    same_colour, same_shape = (one[:, :, None] == one[:, None] for one in (colour, shape))
    kinds = np.where(same_colour, np.where(same_shape, 0, 1), np.where(same_shape, 2, 3))
    two = present[:, :, None] & present[:, None] & ~np.eye(9, dtype=bool)
    return np.where(two, kinds, -1)
