"""The step: schedule, agree, build, launch, settle."""
