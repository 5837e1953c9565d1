"""Requests and answers of the API, by their names."""

from deploy.openai_answers import RouteReport, WorkerRoute
from deploy.openai_requests import ChatRequest, CompletionRequest

__all__ = ["ChatRequest", "CompletionRequest", "RouteReport", "WorkerRoute"]
