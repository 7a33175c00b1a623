"""Secure aggregation: the server learns the sum over the nodes of a round and nothing about any single node.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth 2017, "Practical Secure
Aggregation for Privacy-Preserving Machine Learning" (protocol of figure 4, honest-but-curious),
with two masks on every update.
"""
