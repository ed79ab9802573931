"""What a step costs: seconds and bytes of a model on a layout of a cluster. numpy only."""
