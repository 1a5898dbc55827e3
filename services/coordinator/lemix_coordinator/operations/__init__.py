"""Operations: rare, long changes of the cluster, each transition one Celery task."""
