"""The models that ship, each with its data: plug-ins of steerfm, found by entry point (see `steerfm.plugins`)."""
