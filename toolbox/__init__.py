"""Tools of the scripts: options, optimizers, run folders, figures. Nothing here is about attention."""
import os

# Figures go to files, never to a display. (Jupyter sets MPLBACKEND to a module that need not be installed here. Then
# even `import matplotlib` would fail.)
os.environ["MPLBACKEND"] = "Agg"
