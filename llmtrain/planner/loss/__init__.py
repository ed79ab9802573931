"""What a run ends at: loss by parameters and tokens, from published runs and from own ones. numpy only."""
