"""The machine around us: its environment, its addresses, its processes, its terminal."""
