"""What averaging the curvature over processes costs, and what ``sync="lagged"`` does to a training."""
