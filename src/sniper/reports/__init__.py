"""Pictures of chips and detections, and tables and curves of scores."""
