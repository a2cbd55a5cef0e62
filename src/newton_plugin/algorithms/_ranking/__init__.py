"""What is learned from a sort: the ranking loss, soft ranks, top-k, NDCG and average precision."""
