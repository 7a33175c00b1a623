"""A federation of machines: certificates, keys, SuperLink and SuperExec."""
