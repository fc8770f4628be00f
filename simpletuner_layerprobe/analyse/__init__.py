"""From arrays of distances to heatmaps, contributions, findings and comparisons. numpy and scipy alone."""
