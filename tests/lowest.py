"""The lowest version of everything that steerfm asks for, one pip constraint a line: `make test-lowest` installs them."""

import re
from importlib.metadata import requires

for requirement in requires("steerfm") or []:
    if "extra ==" not in requirement:
        name, version = re.match(r"([\w.-]+).*?>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        print(f"{name}=={version}")
