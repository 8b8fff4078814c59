"""One file per selection: which sites are adapted at all. Importing the package registers them all."""

from rankworks.core.discover import import_all

import_all(__name__, __path__)
