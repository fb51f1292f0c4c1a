"""Tools of the scripts: options, optimizers, run folders, figures. Nothing here is about attention."""
