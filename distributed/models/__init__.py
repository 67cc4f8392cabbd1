"""The networks. Models know nothing about ranks: engines wrap or convert them from outside."""
