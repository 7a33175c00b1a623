"""First-order training of small networks by compiled C++: the source, its library, which modules it knows, and the call."""
