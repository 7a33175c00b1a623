"""First-order training of small networks by compiled C++: the source, its build, the networks it supports, and the calls."""
