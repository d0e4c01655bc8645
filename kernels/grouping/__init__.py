"""Which rows belong to which group, from ids on the device."""
