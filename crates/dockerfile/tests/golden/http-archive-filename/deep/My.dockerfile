FROM alpine
COPY c d
