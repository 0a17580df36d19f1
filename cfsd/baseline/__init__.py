"""What the seeds of a recipe came to, committed by a team, and judged against by the gate."""
