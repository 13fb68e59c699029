"""What happens to a batch of scored groups in one step: collate, teach, take the student's losses, report."""
