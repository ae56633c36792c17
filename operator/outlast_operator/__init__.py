"""The Kubernetes operator: watches TrainingJobs, makes their Pods, writes their status."""
