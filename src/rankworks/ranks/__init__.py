"""One file per rank schedule: how rank is spread and changed. Importing the package registers them all."""

from rankworks.core.discover import import_all

import_all(__name__, __path__)
