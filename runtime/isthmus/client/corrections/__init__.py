"""Client-side corrections of local training, as the job's strategy requires."""
